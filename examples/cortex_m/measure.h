/* Measures the instructions and the stack of a piece of code in QEMU. */
#ifndef MEASURE_H
#define MEASURE_H

#include <stdint.h>

/* Instructions in a tick of the board's 25 MHz, if QEMU takes a nanosecond for each
   (-icount shift=0). */
#define INSTRUCTIONS 40u

#define STACK_WORDS 1024 /* Words of the stack that are watched. */
#define PATTERN 0xdeadbeefu

/* The first timer of an MPS2 board: control, value and reload. It counts down. */
#define TIMER ((volatile uint32_t *)0x40000000)

static volatile uint32_t *stack_at;

/* Fills the free stack with a pattern, and starts the timer. */
static inline __attribute__((always_inline)) void measure_begin(void) {
  volatile uint32_t *p;
  __asm__ volatile("mov %0, sp" : "=r"(stack_at));
  for (p = stack_at - STACK_WORDS; p < stack_at; p++) *p = PATTERN;
  TIMER[2] = TIMER[1] = 0xffffffff;
  TIMER[0] = 1;
}

/* Returns the instructions since `measure_begin`. */
static inline uint32_t measure_instructions(void) {
  return (0xffffffffu - TIMER[1]) * INSTRUCTIONS;
}

/* Returns the bytes of stack that were written since `measure_begin`. */
static inline uint32_t measure_stack(void) {
  volatile uint32_t *p = stack_at - STACK_WORDS;
  while (*p == PATTERN) p++;
  return (uint32_t)(stack_at - p) * 4;
}

#endif
