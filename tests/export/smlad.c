/* Multiplies codes by the DSP instruction SMLAD, which exported C files do not use.
   Each step reads four inputs of two windows in 16 bits, and four weights of two
   channels in 8 bits, as CMSIS-NN does. It says how many instructions all products
   take, and whether the sums are right. */
#include <arm_acle.h>

#include "measure.h"
#include "semihosting.h"

#define TERMS 576
#define CHANNELS 64

static int16_t inputs[2][TERMS];
static int8_t weights[CHANNELS][TERMS];
static int32_t sums[2][CHANNELS];

/* Two of four bytes at p in the halves of a word, and the other two of them. */
static inline void widen(const int8_t* p, int16x2_t* even, int16x2_t* odd) {
  const uint32_t word = *(const uint32_t*)(const void*)p;
  *even = __sxtb16((int8x4_t)word);
  *odd = __sxtb16((int8x4_t)(word >> 8 | word << 24));
}

__attribute__((noinline)) static void multiply(void) {
  int c, k;
  for (c = 0; c < CHANNELS; c += 2) {
    const int16x2_t* x = (const int16x2_t*)(const void*)inputs[0];
    const int16x2_t* y = (const int16x2_t*)(const void*)inputs[1];
    const int8_t *v = weights[c], *w = weights[c + 1];
    int32_t a = 0, b = 0, d = 0, e = 0;
    for (k = 0; k < TERMS; k += 4, x += 2, y += 2, v += 4, w += 4) {
      int16x2_t even, odd;
      widen(v, &even, &odd);
      a = __smlad(even, x[0], __smlad(odd, x[1], a));
      b = __smlad(even, y[0], __smlad(odd, y[1], b));
      widen(w, &even, &odd);
      d = __smlad(even, x[0], __smlad(odd, x[1], d));
      e = __smlad(even, y[0], __smlad(odd, y[1], e));
    }
    sums[0][c] = a;
    sums[1][c] = b;
    sums[0][c + 1] = d;
    sums[1][c + 1] = e;
  }
}

int main(void) {
  uint32_t instructions;
  int c, k, i, right = 0;
  for (k = 0; k < TERMS; k++) {
    /* Bytes 0 and 2 of four come first, and then bytes 1 and 3. */
    const int to = (k & ~3) + (k & 3) / 2 + (k & 1) * 2;
    inputs[0][to] = (int16_t)(k % 9 - 4);
    inputs[1][to] = (int16_t)(k % 7 - 3);
    for (c = 0; c < CHANNELS; c++) weights[c][k] = (int8_t)((k * 5 + c) % 9 - 4);
  }
  measure_begin();
  multiply();
  instructions = measure_instructions();
  for (c = 0; c < CHANNELS; c++) {
    for (i = 0; i < 2; i++) {
      int32_t sum = 0;
      for (k = 0; k < TERMS; k++)
        sum += (i ? k % 7 - 3 : k % 9 - 4) * ((k * 5 + c) % 9 - 4);
      right += sum == sums[i][c];
    }
  }
  say("right ");
  say_number((unsigned long)right);
  say("\ninstructions ");
  say_number(instructions);
  say("\nproducts ");
  say_number(2ul * TERMS * CHANNELS);
  say("\n");
  return 0;
}
