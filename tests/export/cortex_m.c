/* Runs an exported network on a bare Cortex-M3 in QEMU and says, by semihosting, for
   each image its label and whether all scores are as expected, then how many
   instructions and how much stack the last one took. "net.c" is the network,
   "vectors.h" has IMAGES, images and wanted. */
#include "net.c"
#include "vectors.h"

#define STACK 4096
#define PATTERN 0xdeadbeefu
#define TIMER ((volatile uint32_t *)0x40000000) /* Control, value, reload. */

extern uint32_t stack_bottom[], stack_top[];

/* Memory starts as zeros, and nothing in it has other initial values. */
void reset(void);
__attribute__((section(".vectors"), used)) static const void *vectors[] = {
    stack_top, (void *)reset};

static void call(int operation, const void *argument) {
  register int r0 __asm__("r0") = operation;
  register const void *r1 __asm__("r1") = argument;
  __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
}

static void say(const char *text, long number) {
  char digits[12], *p = digits + 11;
  *p = 0;
  do *--p = '0' + number % 10; while (number /= 10);
  call(4, text);
  call(4, p);
  call(4, "\n");
}

__attribute__((noinline)) static int run(const uint8_t *image, int32_t *scores) {
  return minw_run(image, scores);
}

void reset(void) {
  static int32_t scores[MINW_CLASSES];
  static const uint32_t done[] = {0x20026, 0};
  const long size = sizeof images / IMAGES;
  uint32_t *top, *p, ticks = 0;
  int i, k, right = 0;
  for (i = 0; i < IMAGES; i++) {
    int label;
    __asm__ volatile("mov %0, sp" : "=r"(top));
    for (p = top - STACK / 4; p < top; p++) *(volatile uint32_t *)p = PATTERN;
    TIMER[2] = TIMER[1] = 0xffffffff;
    TIMER[0] = 1;
    ticks = TIMER[1];
    label = run(images + i * size, scores);
    ticks -= TIMER[1];
    for (p = top - STACK / 4; *(volatile uint32_t *)p == PATTERN;) p++;
    say("label ", label);
    for (k = 0; k < MINW_CLASSES; k++) right += scores[k] == wanted[i * MINW_CLASSES + k];
  }
  say("right ", right);
  say("stack ", (top - p) * 4);
  say("ticks ", ticks);
  call(0x20, done);
  for (;;) {}
}
