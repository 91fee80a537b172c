/* Measures int8 convolutions by CMSIS-NN. "layers.h" has LAYERS, the shapes of some
   convolutions with a stride of 1, and the sizes of the largest buffers: INPUTS,
   WEIGHTS, OUTPUTS and CHANNELS. It says for each layer how many instructions it takes,
   and how many of the results compared are right. */
#include "arm_nnfunctions.h"

#include "layers.h"
#include "measure.h"
#include "semihosting.h"

#define OFFSET 128 /* Added to each input. */
#define SHIFT 11   /* A result is a sum divided by 2^(SHIFT + 1). */

typedef struct {
  int height, width, channels, out, rows, columns, pad, high, wide;
} Layer;

static const Layer layers[] = LAYERS;
static int8_t inputs[INPUTS], weights[WEIGHTS], outputs[OUTPUTS];
static int32_t bias[CHANNELS], multipliers[CHANNELS], shifts[CHANNELS];
static int32_t buffer[16384];

static int8_t draw(void) {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return (int8_t)(state >> 24);
}

/* A sum divided by 2^(SHIFT + 1), rounded twice, within the range of a byte. */
static int8_t scaled(int32_t sum) {
  const int32_t half = (sum + 1) >> 1;
  int32_t v = (half + (1 << (SHIFT - 1)) - (half < 0)) >> SHIFT;
  v = v < -128 ? -128 : v > 127 ? 127 : v;
  return (int8_t)v;
}

static int8_t wanted(const Layer *at, int y, int x, int c) {
  int32_t sum = bias[c];
  int i, j, k;
  for (i = 0; i < at->rows; i++) {
    for (j = 0; j < at->columns; j++) {
      const int r = y + i - at->pad, s = x + j - at->pad;
      if (r < 0 || r >= at->height || s < 0 || s >= at->width) continue;
      for (k = 0; k < at->channels; k++)
        sum += (inputs[(r * at->width + s) * at->channels + k] + OFFSET) *
               weights[((c * at->rows + i) * at->columns + j) * at->channels + k];
    }
  }
  return scaled(sum);
}

/* The number of channels that are right in the first, the middle and the last pixel. */
static int compare(const Layer *at) {
  const int last = at->high * at->wide - 1;
  int c, k, right = 0;
  for (k = 0; k < 3; k++) {
    const int pixel = last * k / 2;
    for (c = 0; c < at->out; c++)
      right += outputs[pixel * at->out + c] ==
               wanted(at, pixel / at->wide, pixel % at->wide, c);
  }
  return right;
}

static void say_line(const char *name, unsigned long number) {
  say(name);
  say_number(number);
  say("\n");
}

/* Returns the instructions of a layer. */
static uint32_t measure(const Layer *at) {
  const cmsis_nn_dims in = {.n = 1, .h = at->height, .w = at->width, .c = at->channels};
  const cmsis_nn_dims window = {
      .n = at->out, .h = at->rows, .w = at->columns, .c = at->channels};
  const cmsis_nn_dims out = {.n = 1, .h = at->high, .w = at->wide, .c = at->out};
  const cmsis_nn_dims biases = {.n = 1, .h = 1, .w = 1, .c = at->out};
  const cmsis_nn_conv_params params = {.input_offset = OFFSET,
                                       .stride = {1, 1},
                                       .padding = {at->pad, at->pad},
                                       .dilation = {1, 1},
                                       .activation = {-128, 127}};
  const cmsis_nn_per_channel_quant_params scales = {multipliers, shifts};
  const int32_t size =
      arm_convolve_wrapper_s8_get_buffer_size(&params, &in, &window, &out);
  const cmsis_nn_context context = {buffer, size};
  if (size > (int32_t)sizeof buffer) quit(1);
  measure_begin();
  if (arm_convolve_wrapper_s8(&context, &params, &scales, &in, inputs, &window, weights,
                              &biases, bias, &out, outputs))
    quit(1);
  return measure_instructions();
}

int main(void) {
  unsigned k;
  int i;
  for (i = 0; i < INPUTS; i++) inputs[i] = draw();
  for (i = 0; i < WEIGHTS; i++) weights[i] = draw();
  for (i = 0; i < CHANNELS; i++) {
    bias[i] = draw();
    multipliers[i] = 1 << 30;
    shifts[i] = -SHIFT;
  }
  for (k = 0; k < sizeof layers / sizeof *layers; k++) {
    say_line("instructions ", measure(&layers[k]));
    say_line("right ", (unsigned long)compare(&layers[k]));
  }
  return 0;
}
