/* Measures the instructions and the stack of a piece of code in QEMU. */
#ifndef MEASURE_H
#define MEASURE_H

#include <stdint.h>

#define STACK_WORDS 1024 /* Words of the stack that are watched. */
#define PATTERN 0xdeadbeefu

/* A timer that counts down, and the instructions in its ticks, if QEMU takes a
   nanosecond for each (-icount shift=0). MPS2 boards have one of 32 bits and 25 MHz.
   Its registers are control, value and reload. With a Cortex-M55, which is on an MPS3
   board, it is SysTick of 24 bits and 32 MHz: control, reload and value. */
#ifdef __ARM_FEATURE_MVE
#define TIMER ((volatile uint32_t *)0xe000e010)
#define VALUE 2
#define RELOAD 1
#define START 5u
#define MOST 0xffffffu
#define INSTRUCTIONS(ticks) ((ticks) * 125 / 4)
#else
#define TIMER ((volatile uint32_t *)0x40000000)
#define VALUE 1
#define RELOAD 2
#define START 1u
#define MOST 0xffffffffu
#define INSTRUCTIONS(ticks) ((ticks) * 40)
#endif

static volatile uint32_t *stack_at;

/* Fills the free stack with a pattern, and starts the timer. */
static inline __attribute__((always_inline)) void measure_begin(void) {
  volatile uint32_t *p;
  __asm__ volatile("mov %0, sp" : "=r"(stack_at));
  for (p = stack_at - STACK_WORDS; p < stack_at; p++) *p = PATTERN;
  TIMER[RELOAD] = TIMER[VALUE] = MOST;
  TIMER[0] = START;
}

/* Returns the instructions since `measure_begin`. */
static inline uint32_t measure_instructions(void) {
  return INSTRUCTIONS(MOST - TIMER[VALUE]);
}

/* Returns the bytes of stack that were written since `measure_begin`. */
static inline uint32_t measure_stack(void) {
  volatile uint32_t *p = stack_at - STACK_WORDS;
  while (*p == PATTERN) p++;
  return (uint32_t)(stack_at - p) * 4;
}

#endif
