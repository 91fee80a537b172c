// Loading of a network: the steps in their order.
#include "engine.h"

minw_network::minw_network(const uint8_t* bytes, size_t size,
                           const minw::Limits& limits)
    : program(minw::parse(bytes, size, limits)), choice(minw::best_isa()) {
  program.source.offset = program.offset.data();
  int n = static_cast<int>(program.ops.size());
  layers.resize(n);
  thresholds.resize(n);
  for (int i = 0; i < n; i++) {
    minw::Op& op = program.ops[i];
    if (op.kind == minw::kConv) {
      layers[i] =
          minw::make_layers(program, i, layer_isa(op, program.values[i + 1].map));
      op.weights = {};  // They point into the caller's bytes.
    } else if (op.kind == minw::kThreshold) {
      int stride = program.values[i + 1].map.stride;
      thresholds[i] = {op.bits, op.codes,       op.count,
                       stride,  op.flip.data(), op.thresholds.data()};
    }
  }
  plain = minw::make_plan(*this, /*fused=*/false, /*reach=*/0);
  // A pass runs where its last operation was. If that one is far from the convolution,
  // the convolution's input lives longer, and in a network with many such passes the
  // inputs pile up. In that case only neighbors are fused.
  fast = minw::make_plan(*this, /*fused=*/true, /*reach=*/n);
  if (fast.arena > limits.memory)
    fast = minw::make_plan(*this, /*fused=*/true, /*reach=*/1);
}

const minw::Isa& minw_network::layer_isa(const minw::Op& conv,
                                         const minw::Map& out) const {
  const minw::Map& in = program.values[conv.inputs[0]].map;
  bool bits = conv.weights.grid() && (in.kind == minw::kCode || !conv.inputs[0]);
  if (choice.forced || !bits) return choice.isa;
  return *minw::fastest_isa(&choice.isa, conv.weights.format, in.bits, out.h * out.w);
}
