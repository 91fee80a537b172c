/* Firmware that classifies the images of images.h with the network of net.c. It prints
   the label of each image, then what the last one took. */
#include "images.h"
#include "measure.h"
#include "net.h"
#include "semihosting.h"

/* The call is apart, so that only its own stack is measured. */
static __attribute__((noinline)) int run(const uint8_t *image) {
  return net_run(image, 0);
}

static void say_line(const char *name, unsigned long number) {
  say(name);
  say_number(number);
  say("\n");
}

int main(void) {
  unsigned long instructions = 0;
  int i;
  for (i = 0; i < IMAGES; i++) {
    int label;
    measure_begin();
    label = run(images[i]);
    instructions = measure_instructions();
    say(names[i]);
    say("\t");
    say(net_labels[label]);
    say("\n");
  }
  say_line("instructions ", instructions);
  say_line("stack ", measure_stack());
  return 0;
}
