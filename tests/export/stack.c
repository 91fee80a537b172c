/* Runs an exported network on a painted stack and says how many bytes it took. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include "net.h"

#define SIZE 65536
#define PAINT 0xa5

static ucontext_t caller, callee;
static uint8_t image[MINW_HEIGHT * MINW_WIDTH * MINW_CHANNELS];
static int32_t scores[MINW_CLASSES];

static void run(void) { minw_run(image, scores); }

int main(void) {
  unsigned char *stack = malloc(SIZE);
  size_t untouched = 0;
  memset(stack, PAINT, SIZE);
  getcontext(&callee);
  callee.uc_stack.ss_sp = stack;
  callee.uc_stack.ss_size = SIZE;
  callee.uc_link = &caller;
  makecontext(&callee, run, 0);
  swapcontext(&caller, &callee);
  while (untouched < SIZE && stack[untouched] == PAINT) untouched++;
  printf("%d\n", (int)(SIZE - untouched));
  return 0;
}
