/* Starts a Cortex-M: the vectors, and what happens before and after main. The names of
   memory are from the linker script. */
#include <stdint.h>

#include "semihosting.h"

extern uint32_t stack_top[], data_load[], data_start[], data_end[], bss_start[],
    bss_end[];

int main(void);
void reset(void);

/* Turns on the coprocessors 10 and 11: floating point, and Helium of a Cortex-M55. */
#ifdef __ARM_FP
#define COPROCESSORS (*(volatile uint32_t *)0xe000ed88)
#endif

void reset(void) {
  const uint32_t *from = data_load;
  volatile uint32_t *to; /* Otherwise compilers call functions of a library. */
#ifdef COPROCESSORS
  COPROCESSORS |= 0xfu << 20;
  __asm__ volatile("dsb\n\tisb");
#endif
  for (to = data_start; to < data_end;) *to++ = *from++;
  for (to = bss_start; to < bss_end;) *to++ = 0;
  quit(main());
}

static void fault(void) {
  say("fault\n");
  quit(1);
}

struct vectors {
  uint32_t *stack;
  void (*handlers[6])(void);
};

/* Reset, NMI, and the faults of hardware, memory, bus and usage. */
__attribute__((section(".vectors"), used)) static const struct vectors vectors = {
    stack_top, {reset, fault, fault, fault, fault, fault}};
