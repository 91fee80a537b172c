/* Runs an exported network with what examples/cortex_m starts and measures with. It says
   for each image its label and whether all scores are as expected, then how many
   instructions and how much stack the last one took. "net.c" is the network, "vectors.h"
   has IMAGES, images and wanted. */
#include "net.c"
#include "vectors.h"

#include "measure.h"
#include "semihosting.h"

static void say_line(const char *name, unsigned long number) {
  say(name);
  say_number(number);
  say("\n");
}

__attribute__((noinline)) static int run(const uint8_t *image, int32_t *scores) {
  return minw_run(image, scores);
}

int main(void) {
  static int32_t scores[MINW_CLASSES];
  const long size = sizeof images / IMAGES;
  uint32_t instructions = 0, stack = 0;
  int i, k, right = 0;
  for (i = 0; i < IMAGES; i++) {
    int label;
    measure_begin();
    label = run(images + i * size, scores);
    instructions = measure_instructions();
    stack = measure_stack();
    say_line("label ", label);
    for (k = 0; k < MINW_CLASSES; k++) right += scores[k] == wanted[i * MINW_CLASSES + k];
  }
  say_line("right ", right);
  say_line("stack ", stack);
  say_line("instructions ", instructions);
  return 0;
}
