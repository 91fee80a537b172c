// Fast convolutions of images with float weights: the algorithm of Winograd, in the
// form of Toom and Cook, along the rows.
//
// Let a kernel have r taps in a row, and let its pixels be the numbers d[0], d[1], ...
// Then m = 7 - r + 1 neighboring results read 7 pixels, and take m r products. Read as
// coefficients of polynomials, taps and results have a product of m + r - 1 = 7
// coefficients, which its values at 7 points determine. The transpose of this scheme
// computes a convolution with one product for each point instead:
//
//   result[i] = sum over points p of  p^i U[p] V[p]
//
//   U[p] = sum(p^t w[t]) / prod(p - q), over all other finite points q
//   V[p] = sum(c[k] d[k]), where sum(c[k] x^k) = prod(x - q), over the same points
//
// The last point is infinity: its U is the last tap, its product is over all finite
// points, and it adds to the last result alone. For r = 4 there are 7 products in place
// of 16. They are summed over rows and channels before the results are computed.
//
// With a stride, pixels of the same remainder are neighbors: a kernel of 7 taps and
// stride 2 is two kernels of 4 taps, the last one of which is 0 in the second kernel.
//
// Pixels are integers, so that V is exact. U is computed in double precision and then
// rounded. The points are small and near 1, where powers lose little: the error of a
// result is about twice that of direct sums.
//
// Literature: S. Winograd, Arithmetic Complexity of Computations, 1980; A. Lavin and
// S. Gray, Fast Algorithms for Convolutional Neural Networks, 2016.
#ifndef MINW_WINOGRAD_H_
#define MINW_WINOGRAD_H_

namespace minw {

// Finite points, and all points.
constexpr int kFinite = 6, kPoints = kFinite + 1;
constexpr float kFinitePoints[kFinite] = {0, 1, -1, 2, -2, .5f};

// The coefficients of the product of all x - q, and the product of all p - q, over the
// finite points q other than p.
struct PointProduct {
  float coefficients[kPoints];
  float value;  // For a finite p, else 1.
};

constexpr PointProduct point_product(int point) {
  PointProduct product = {{1}, 1};
  for (int k = 0; k < kFinite; k++) {
    if (k == point) continue;
    const float q = kFinitePoints[k];
    if (point < kFinite) product.value *= kFinitePoints[point] - q;
    for (int i = kFinite; i >= 0; i--)
      product.coefficients[i] =
          (i ? product.coefficients[i - 1] : 0) - q * product.coefficients[i];
  }
  return product;
}

constexpr PointProduct kProducts[kPoints] = {
    point_product(0), point_product(1), point_product(2), point_product(3),
    point_product(4), point_product(5), point_product(6)};

// Numbers V that are computed at a time.
constexpr int kTileNumbers = 8;

}  // namespace minw

#endif  // MINW_WINOGRAD_H_
