// Whether two instruction sets compute the same: compare ISA ISA FILES.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <vector>

#include "minw.h"

namespace {

// All values and the logits of some images.
std::vector<float> run(const char* isa, const char* path) {
  setenv("MINW_ISA", isa, 1);
  std::ifstream file(path, std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  char error[256];
  minw_network* network = minw_load(bytes.data(), bytes.size(), error, sizeof error);
  if (!network) {
    std::fprintf(stderr, "%s: %s\n", path, error);
    std::exit(1);
  }
  const size_t batch = 7;
  std::vector<size_t> sizes = {batch * minw_classes(network)};
  size_t all = sizes[0];
  for (uint32_t i = 0; i <= minw_num_ops(network); i++) {
    minw_shape shape = minw_value_shape(network, i);
    sizes.push_back(batch * shape.height * shape.width * shape.channels);
    all += sizes.back();
  }
  std::vector<float> results(all);  // Integers too: 4 bytes each.
  std::vector<void*> values;
  size_t at = 0;
  for (size_t size : sizes) {
    values.push_back(&results[at]);
    at += size;
  }
  minw_shape source = minw_source(network);
  std::vector<uint8_t> images(batch * source.height * source.width * source.channels);
  for (size_t i = 0; i < images.size(); i++)
    images[i] = static_cast<uint8_t>(i * i * 31 + i * 7);
  if (minw_logits(network, images.data(), batch, results.data(), 2, error,
                  sizeof error) ||
      minw_values(network, images.data(), batch, &values[1], error, sizeof error)) {
    std::fprintf(stderr, "%s: %s\n", path, error);
    std::exit(1);
  }
  minw_free(network);
  return results;
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 3; i < argc; i++) {
    std::vector<float> a = run(argv[1], argv[i]), b = run(argv[2], argv[i]);
    if (a.size() != b.size() || std::memcmp(a.data(), b.data(), a.size() * 4)) {
      std::fprintf(stderr, "%s: %s and %s differ\n", argv[i], argv[1], argv[2]);
      return 1;
    }
  }
}
