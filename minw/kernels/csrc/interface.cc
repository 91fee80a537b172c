// The C interface (minw.h): no exception leaves it, and results are copied out.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "engine.h"

using minw::Map;
using minw::Team;

namespace {

// Calls body(). Returns false if it threw, with the message in `error`.
template <class Body>
bool guarded(char* error, size_t size, const Body& body) {
  const char* message = nullptr;
  std::string text;
  try {
    body();
    return true;
  } catch (const std::bad_alloc&) {
    message = "out of memory";
  } catch (const std::exception& e) {
    try {
      text = e.what();
      message = text.c_str();
    } catch (...) {
      message = "out of memory";
    }
  }
  if (error && size) std::snprintf(error, size, "%s", message);
  return false;
}

minw_shape shape(const Map& m) {
  return {static_cast<uint32_t>(m.h), static_cast<uint32_t>(m.w),
          static_cast<uint32_t>(m.c), m.kind, static_cast<uint32_t>(m.bits)};
}

// Copies a value of one image without the padding of its channels, as 4 bytes each.
void copy_value(const Map& m, const char* from, char* to) {
  size_t pixels = static_cast<size_t>(m.h) * m.w;
  for (size_t p = 0; p < pixels; p++, to += m.c * size_t{4})
    for (int c = 0; c < m.c; c++) {
      size_t k = p * m.stride + c;
      int32_t wide;
      if (m.kind == minw::kCode)
        wide = int{reinterpret_cast<const int8_t*>(from)[k]};
      else
        std::memcpy(&wide, from + k * 4, 4);
      std::memcpy(to + c * size_t{4}, &wide, 4);
    }
}

}  // namespace

minw_network* minw_load(const void* bytes, size_t size, char* error,
                        size_t error_size) {
  return minw_load_within(bytes, size, nullptr, error, error_size);
}

minw_network* minw_load_within(const void* bytes, size_t size,
                               const minw_limits* limits, char* error,
                               size_t error_size) {
  minw_network* network = nullptr;
  guarded(error, error_size, [&] {
    minw::Limits most;
    if (limits) most = {limits->padding, limits->memory, limits->operations};
    network = new minw_network(static_cast<const uint8_t*>(bytes), size, most);
  });
  return network;
}

void minw_free(minw_network* network) { delete network; }

minw_shape minw_source(const minw_network* network) {
  const minw::Program& p = network->program;
  return {static_cast<uint32_t>(p.source.h), static_cast<uint32_t>(p.source.w),
          static_cast<uint32_t>(p.channels), MINW_INT, 0};
}

uint32_t minw_classes(const minw_network* network) { return network->program.classes; }

const char* minw_metadata(const minw_network* network, size_t* size) {
  if (size) *size = network->program.metadata.size();
  return network->program.metadata.data();
}

int minw_logits(const minw_network* network, const uint8_t* images, size_t batch,
                float* logits, int threads, char* error, size_t error_size) {
  const minw_network& net = *network;
  auto pass = [&](size_t first, size_t n, const Team::Lease& team) {
    auto scratch = net.spare.take(net.scratch_bytes(net.fast, n, team.threads()));
    minw::run(net, net.fast, images + first * net.image_bytes(), n, scratch->data(),
              logits + first * net.program.classes, team);
    net.spare.keep(std::move(scratch));
  };
  bool done = guarded(error, error_size, [&] {
    Team::Lease team(threads);
    size_t workers = team.threads();
    // With fewer images than threads, the threads share the layers of all images.
    bool shared = batch < workers;
    size_t group = std::min(net.fast.group, (batch + workers - 1) / workers);
    if (shared) group = net.fast.group;
    size_t groups = batch ? (batch + group - 1) / group : 0;
    auto size = [&](size_t i) { return std::min(group, batch - i * group); };
    if (shared) {
      for (size_t i = 0; i < groups; i++) pass(i * group, size(i), team);
      return;
    }
    // Otherwise groups of images are the pieces of work.
    const Team::Lease alone(1);
    std::atomic<bool> failed{false};
    for (size_t begin = 0; begin < groups; begin += Team::kMaxPieces)
      team.loop(std::min(groups - begin, Team::kMaxPieces), [&](size_t i, int) {
        try {
          pass((begin + i) * group, size(begin + i), alone);
        } catch (const std::bad_alloc&) {
          failed = true;
        }
      });
    if (failed) throw std::bad_alloc();
  });
  return done ? 0 : -1;
}

int minw_profile(const minw_network* network, const uint8_t* images, size_t batch,
                 int threads, double* seconds, char* error, size_t error_size) {
  const minw_network& net = *network;
  bool done = guarded(error, error_size, [&] {
    const Team::Lease team(threads);
    const size_t group = net.fast.group;
    // Scratch memory of an earlier call costs no page faults.
    auto scratch = net.spare.take(net.scratch_bytes(net.fast, group, team.threads()));
    std::vector<float> logits(net.program.classes * group);
    std::fill_n(seconds, net.program.ops.size(), 0.0);
    for (size_t i = 0; i < batch; i += group)
      minw::run(net, net.fast, images + i * net.image_bytes(),
                std::min(group, batch - i), scratch->data(), logits.data(), team,
                seconds);
    net.spare.keep(std::move(scratch));
  });
  return done ? 0 : -1;
}

uint32_t minw_num_ops(const minw_network* network) {
  return static_cast<uint32_t>(network->program.ops.size());
}

minw_shape minw_value_shape(const minw_network* network, uint32_t value) {
  return shape(network->program.values[value].map);
}

const char* minw_op_name(const minw_network* network, uint32_t op) {
  return network->program.ops[op].name.c_str();
}

const char* minw_op_kernel(const minw_network* network, uint32_t op) {
  const auto& layers = network->layers[op];
  if (!layers.empty()) return layers[0].kernel;
  for (const minw::Step& step : network->fast.steps)
    if (step.op == static_cast<int>(op) && step.conv < 0)
      return network->program.ops[op].kind == minw::kThreshold ? "thresholds"
                                                               : "plain loops";
  return "in the pass of its convolution";
}

int minw_values(const minw_network* network, const uint8_t* images, size_t batch,
                void* const* values, char* error, size_t error_size) {
  const minw_network& net = *network;
  bool done = guarded(error, error_size, [&] {
    const Team::Lease alone(1);
    minw::Buffer scratch(net.scratch_bytes(net.plain, 1, 1));
    std::vector<float> logits(net.program.classes);
    size_t count = net.program.values.size();
    for (size_t i = 0; i < batch; i++) {
      const uint8_t* image = images + i * net.image_bytes();
      minw::run(net, net.plain, image, 1, scratch.data(), logits.data(), alone);
      if (values[0])
        minw::store_images(net, image, 1, scratch.data() + net.plain.offset[0]);
      for (size_t v = 0; v < count; v++) {
        if (!values[v]) continue;
        const Map& m = net.program.values[v].map;
        size_t bytes = static_cast<size_t>(m.h) * m.w * m.c * 4;
        char* to = static_cast<char*>(values[v]) + i * bytes;
        if (v + 1 == count)
          std::memcpy(to, logits.data(), bytes);
        else
          copy_value(m, scratch.data() + net.plain.offset[v], to);
      }
    }
  });
  return done ? 0 : -1;
}

const char* minw_isa(const minw_network* network) {
  if (network) return network->choice.isa.name;
  const char* name = "";
  guarded(nullptr, 0, [&] { name = minw::best_isa().isa.name; });
  return name;
}

const char* minw_isas(void) { return minw::isa_names(); }

uint64_t minw_peak(const minw_network* network, uint32_t op, uint64_t steps) {
  const auto& layers = network->layers[op];
  return layers.empty() || !layers[0].conv.peak ? 0 : layers[0].conv.peak(steps);
}

uint64_t minw_hash(const void* bytes, size_t size) {
  uint64_t hash = 0xcbf29ce484222325;
  for (size_t i = 0; i < size; i++)
    hash = (hash ^ static_cast<const uint8_t*>(bytes)[i]) * 0x100000001b3;
  return hash;
}
