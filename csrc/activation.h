// exp and exact GELU on 16 lanes. Only correctly rounded operations, so every target gives the same bits.
#pragma once

namespace xfast {
namespace XFAST_TARGET {

// e^x for x <= 0 (any x < 88 works); below -87 the result stays at the smallest normal numbers. NaN stays NaN: it is
// the second operand of max.
// x = n ln2 + r with |r| <= ln2 / 2; degree-6 minimax polynomial in r (error 2e-9), then times 2^n.
inline V16 exp_nonpositive(V16 x) {
  x = max(set1(-87.0f), x);
  const V16 n = to_float(round_to_int(mul(x, set1(1.4426950408889634f))));
  V16 r = fma(n, set1(-0.693359375f), x);  // ln2 in two parts: the first product is exact
  r = fma(n, set1(2.12194440e-4f), r);
  V16 p = set1(0.0013956119073554873f);
  p = fma(p, r, set1(0.008375170640647411f));
  p = fma(p, r, set1(0.04166608303785324f));
  p = fma(p, r, set1(0.16666415333747864f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return scale_by_power(p, n);
}

constexpr float kRoundedExpOfZero = 8191.0f;

// 8191 * 2^x for x <= 0, exactly 8191 at 0 and nowhere more, for results that are rounded to integers next: relative
// error 3e-6. NaN gives 0. Degree-4 minimax polynomial of 2^r on [0, 1) through 1 at 0, its coefficients times 8191.
inline V16 exp2_rounded(V16 x) {
  x = max(x, set1(-126.0f));
  const V16 n = floor(x), r = sub(x, n);
  V16 p = set1(109.97797393798828f);
  p = fma(p, r, set1(427.9181213378906f));
  p = fma(p, r, set1(1976.326171875f));
  p = fma(p, r, set1(5676.73046875f));
  p = fma(p, r, set1(kRoundedExpOfZero));
  return scale_by_power(p, n);
}

// gelu(x) = x Phi(x), Phi the normal distribution function (the erf form, not tanh).
// NOTE: -ln(2 Phi(-t)) is smooth and nearly quadratic for t >= 0, so one polynomial and one exp give
// h = Phi(-t) with small relative error (1 % far out, where torch keeps no digit); Phi(x) is h for x < 0 and 1 - h
// otherwise. No division. Fitted on [0, 9] (beyond it h < 1.2e-19); |error| < 4e-7 over [-9, 9], most of it the
// rounding of x * Phi.
inline V16 gelu(V16 x) {
  const V16 t = min(abs(x), set1(9.0f));
  V16 p = set1(-7.852310801581552e-08f);
  p = fma(p, t, set1(2.2076549157645786e-06f));
  p = fma(p, t, set1(-2.3460544980480336e-05f));
  p = fma(p, t, set1(0.00010072869918076321f));
  p = fma(p, t, set1(0.0001742805034155026f));
  p = fma(p, t, set1(-0.0050066253170371056f));
  p = fma(p, t, set1(0.03646620362997055f));
  p = fma(p, t, set1(0.31827273964881897f));
  p = fma(p, t, set1(0.797888457775116f));
  p = mul(p, t);
  const V16 h = mul(set1(0.5f), exp_nonpositive(sub(set1(0.0f), p)));
  const V16 phi = select_negative(x, h, sub(set1(1.0f), h));
  return mul(x, phi);
}

// gelu(x) for results that are rounded to bf16 or int8 next: |error| < 5.1e-5 over [-8, 8], a third of gelu's work.
// Phi(t) = 1/2 + t P(t^2) on |t| <= 4.5, minimax in |x| |error|, with Phi(-4.5) = 0 and Phi(4.5) = 1 to 1e-7
// so that large |x| stay right; the error of small |x| vanishes with x.
inline V16 gelu_rounded(V16 x) {
  const V16 t = min(max(x, set1(-4.5f)), set1(4.5f));
  const V16 u = mul(t, t);
  V16 p = set1(3.000016554621787e-11f);
  p = fma(p, u, set1(-3.283921135022183e-09f));
  p = fma(p, u, set1(1.5802605446424423e-07f));
  p = fma(p, u, set1(-4.43169119535014e-06f));
  p = fma(p, u, set1(8.120979327941313e-05f));
  p = fma(p, u, set1(-0.0010362538741901517f));
  p = fma(p, u, set1(0.009580655954778194f));
  p = fma(p, u, set1(-0.06597727537155151f));
  p = fma(p, u, set1(0.3987075686454773f));
  return mul(x, fma(p, t, set1(0.5f)));
}

}  // namespace XFAST_TARGET
}  // namespace xfast
