// Loads and runs damaged networks, for builds with sanitizers.
//
//   fuzz THREADS FILE
//
// FILE holds networks, each after its size (uint32). Each is loaded and, if that
// succeeds, run by THREADS callers at once. Prints how many were loaded.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <thread>
#include <vector>

#include "minw.h"

namespace {

using Bytes = std::vector<uint8_t>;

// Whether it was loaded.
bool run(const Bytes& bytes, int threads) {
  char error[64];
  minw_network* network = minw_load(bytes.data(), bytes.size(), error, sizeof error);
  if (!network) return false;
  minw_shape source = minw_source(network);
  size_t image = size_t{source.height} * source.width * source.channels;
  size_t elements = image;
  uint32_t ops = minw_num_ops(network);
  for (uint32_t i = 0; i <= ops; i++) {
    minw_shape shape = minw_value_shape(network, i);
    elements += size_t{shape.height} * shape.width * shape.channels;
  }
  const size_t batch = 5;
  if (elements < 100000) {
    Bytes images(image * batch, 77);
    auto call = [&] {
      std::vector<float> logits(batch * minw_classes(network));
      char message[64];
      // With more images than threads these take images, else pieces of layers.
      minw_logits(network, images.data(), batch, logits.data(), threads, message,
                  sizeof message);
      minw_logits(network, images.data(), 1, logits.data(), threads, message,
                  sizeof message);
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back(call);
    call();
    for (auto& other : others) other.join();
    std::vector<std::vector<int32_t>> values(ops + 1);
    std::vector<void*> pointers;
    for (uint32_t i = 0; i <= ops; i++) {
      minw_shape shape = minw_value_shape(network, i);
      values[i].resize(size_t{shape.height} * shape.width * shape.channels);
      pointers.push_back(values[i].data());
    }
    minw_values(network, images.data(), 1, pointers.data(), nullptr, 0);
  }
  minw_free(network);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  int threads = std::atoi(argv[1]), loaded = 0;
  std::ifstream file(argv[2], std::ios::binary);
  uint32_t size;
  while (file.read(reinterpret_cast<char*>(&size), sizeof size)) {
    Bytes bytes(size);
    if (!file.read(reinterpret_cast<char*>(bytes.data()), size)) return 2;
    loaded += run(bytes, threads);
  }
  std::printf("%d loaded\n", loaded);
}
