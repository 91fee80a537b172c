// Loads and runs damaged networks, for builds with sanitizers.
//
//   fuzz ROUNDS THREADS FILES
//
// Each file, as it is and then ROUNDS times with some bytes changed and the checksum
// repaired, is loaded and, if that succeeds, run by THREADS callers at once.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <thread>
#include <vector>

#include "minw.h"

namespace {

using Bytes = std::vector<uint8_t>;

void repair(Bytes* bytes) {
  uint64_t size = bytes->size();
  if (size < 32) return;
  std::memcpy(bytes->data() + 16, &size, 8);
  uint32_t crc = ~0u;
  for (size_t i = 16; i < size; i++) {
    crc ^= (*bytes)[i];
    for (int k = 0; k < 8; k++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
  }
  crc = ~crc;
  std::memcpy(bytes->data() + 12, &crc, 4);
}

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
      minw_logits(network, images.data(), batch, logits.data(), threads, message,
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
  if (argc < 4) return 2;
  int rounds = std::atoi(argv[1]), threads = std::atoi(argv[2]), loaded = 0;
  std::mt19937 random(0);
  for (int i = 3; i < argc; i++) {
    std::ifstream file(argv[i], std::ios::binary);
    Bytes good{std::istreambuf_iterator<char>(file), {}};
    if (!run(good, threads)) {
      std::fprintf(stderr, "%s does not load\n", argv[i]);
      return 1;
    }
    for (int round = 0; round < rounds; round++) {
      Bytes bad = good;
      for (int change = random() % 4; change >= 0; change--) {
        const uint8_t values[] = {0, 1, 2, 127, 128, 255};
        uint8_t& byte = bad[24 + random() % (bad.size() - 24)];
        byte = random() % 2 ? values[random() % 6]
                            : static_cast<uint8_t>(byte ^ 1u << random() % 8);
      }
      if (random() % 8 == 0) bad.resize(random() % bad.size());
      repair(&bad);
      loaded += run(bad, threads);
    }
  }
  std::printf("%d loaded\n", loaded);
}
