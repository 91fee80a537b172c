/* Prints the class of each image: example NETWORK IMAGES, where IMAGES holds unsigned
 * bytes, (number, height, width, channels). */
#include <stdio.h>
#include <stdlib.h>

#include "minw.h"

static unsigned char* read_file(const char* path, size_t* size) {
  unsigned char* bytes = NULL;
  FILE* file = fopen(path, "rb");
  if (!file) return NULL;
  if (!fseek(file, 0, SEEK_END)) {
    long end = ftell(file);
    rewind(file);
    *size = end > 0 ? (size_t)end : 0;
    bytes = malloc(*size + 1);
    if (bytes && fread(bytes, 1, *size, file) != *size) {
      free(bytes);
      bytes = NULL;
    }
  }
  fclose(file);
  return bytes;
}

int main(int argc, char** argv) {
  char error[256];
  size_t size, pixels, batch, i;
  unsigned char *bytes, *images;
  minw_network* network;
  minw_shape source;
  uint32_t classes, k;
  float* logits;
  if (argc != 3 || !(bytes = read_file(argv[1], &size)) ||
      !(images = read_file(argv[2], &pixels))) {
    fprintf(stderr, "usage: example NETWORK IMAGES\n");
    return 2;
  }
  network = minw_load(bytes, size, error, sizeof error);
  free(bytes);
  if (!network) {
    fprintf(stderr, "%s: %s\n", argv[1], error);
    return 1;
  }
  source = minw_source(network);
  classes = minw_classes(network);
  batch = pixels / ((size_t)source.height * source.width * source.channels);
  logits = malloc(batch * classes * sizeof *logits + 1);
  if (!logits || minw_logits(network, images, batch, logits, 2, error, sizeof error)) {
    fprintf(stderr, "%s\n", logits ? error : "out of memory");
    return 1;
  }
  for (i = 0; i < batch; i++) {
    uint32_t best = 0;
    for (k = 1; k < classes; k++)
      if (logits[i * classes + k] > logits[i * classes + best]) best = k;
    printf("%u\n", best);
  }
  free(logits);
  free(images);
  minw_free(network);
  return 0;
}
