"""The text of the CUDA kernels: rows packed for the wire, rows unpacked, and rows summed in a fixed order.

Text only; comm/cuda.py compiles and launches it. Plain C++14 without headers, so that NVRTC and HIP's compiler take it
alike, and a host compiler with a few definitions of what CUDA brings (tests/native/cuda_on_host.h). The twins that say
what the bits must be are torch: comm/rows.py, comm/formats.py, and comm/cuda.py's sum_in_passes.

16-bit and 8-bit floats are widened and narrowed by whole-number arithmetic: no header, no difference between chips.
Products and sums that must not be fused are written as intrinsics (__fmul_rn and the like).
"""

from __future__ import annotations

THREADS = 128  # of every launch: pack_scaled counts on 8 groups of 16

_COMMON = r"""
#ifdef __clang__
#pragma clang fp contract(off)  // HIP's __fmul_rn is a plain product, which clang may fuse with the next sum
#endif

typedef unsigned char Byte;
struct Bfloat16 { unsigned short bits; };
struct Float16 { unsigned short bits; };
struct E4m3fn { unsigned char bits; };    // OCP: bias 7, no inf
struct E4m3fnuz { unsigned char bits; };  // AMD's MI300: bias 8, one zero, one nan

__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline double add(double a, double b) { return __dadd_rn(a, b); }
__device__ inline float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double multiply(double a, double b) { return __dmul_rn(a, b); }

// ---- to float32 (float64 stays), exactly

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(signed char value) { return (float)value; }
__device__ inline float widen(Bfloat16 value) { return __uint_as_float((unsigned int)value.bits << 16); }

__device__ inline float widen(Float16 value) {
    unsigned int sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31u, mantissa = value.bits & 1023u;
    float tiny = 5.9604644775390625e-8f;  // 2^-24
    if (exponent == 0) return __uint_as_float(sign | __float_as_uint((float)mantissa * tiny));
    return __uint_as_float(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13);
}

// An 8-bit float with 3 bits of mantissa that is no nan; tiny is the value of its lowest bit, 2^-(bias + 2).
__device__ inline float widen_e4m3(unsigned int bits, unsigned int bias, float tiny) {
    unsigned int sign = (bits & 0x80u) << 24, exponent = bits >> 3 & 15u, mantissa = bits & 7u;
    if (exponent == 0) return __uint_as_float(sign | __float_as_uint((float)mantissa * tiny));
    return __uint_as_float(sign | (exponent + 127u - bias) << 23 | mantissa << 20);
}

__device__ inline float widen(E4m3fn value) {
    if ((value.bits & 0x7f) == 0x7f) return __uint_as_float(0x7fc00000u);
    return widen_e4m3(value.bits, 7, 0.001953125f);
}

__device__ inline float widen(E4m3fnuz value) {
    if (value.bits == 0x80) return __uint_as_float(0x7fc00000u);
    return widen_e4m3(value.bits, 8, 0.0009765625f);
}

// ---- from float32, rounded half to even

__device__ inline void narrow(float value, float* to) { *to = value; }
__device__ inline void narrow(float value, double* to) { *to = value; }
__device__ inline void narrow(double value, double* to) { *to = value; }

// The value must lie between -127 and 127, nan excluded: what a conversion makes of others is undefined.
__device__ inline void narrow(float value, signed char* to) { *to = (signed char)rintf(value); }

__device__ inline void narrow(float value, Bfloat16* to) {
    unsigned int bits = __float_as_uint(value);
    bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;  // rounding could turn it into inf
    to->bits = (unsigned short)(is_nan ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

__device__ inline void narrow(float value, Float16* to) {
    unsigned int bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu, result;
    if (size > 0x7f800000u) result = 0x7e00u;
    else if (size >= 0x477ff000u) result = 0x7c00u;  // 65520 and more round to inf
    else if (size < 0x38800000u) result = (unsigned int)rintf(__uint_as_float(size) * 16777216.0f);  // below 2^-14
    else result = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
    to->bits = (unsigned short)(sign | result);
}

// The size's bits without sign, of a value within the format's range; per_tiny is 1 / tiny.
__device__ inline unsigned int narrow_e4m3(unsigned int size, unsigned int bias, float per_tiny) {
    if (size < (128u - bias) << 23) return (unsigned int)rintf(__uint_as_float(size) * per_tiny);
    return (size - ((127u - bias) << 23) + 0x7ffffu + (size >> 20 & 1u)) >> 20;
}

__device__ inline void narrow(float value, E4m3fn* to) {
    unsigned int bits = __float_as_uint(value);
    to->bits = (unsigned char)((bits >> 24 & 0x80u) | narrow_e4m3(bits & 0x7fffffffu, 7, 512.0f));
}

__device__ inline void narrow(float value, E4m3fnuz* to) {
    unsigned int bits = __float_as_uint(value), size = narrow_e4m3(bits & 0x7fffffffu, 8, 1024.0f);
    to->bits = (unsigned char)(size ? (bits >> 24 & 0x80u) | size : 0u);  // a negative zero would be the nan
}

// ---- parts of a packed row, by all threads of a block

// As many whole Units as `size` bytes hold; returns the bytes copied. Both addresses are multiples of a Unit's size.
template <typename Unit>
__device__ inline long long copy_units(Byte* to, const Byte* from, long long size) {
    for (long long i = threadIdx.x; i < size / (long long)sizeof(Unit); i += blockDim.x)
        ((Unit*)to)[i] = ((const Unit*)from)[i];
    return size / (long long)sizeof(Unit) * (long long)sizeof(Unit);
}

// `to` is a multiple of 16; `from` may be anything, and the widest units that it allows are copied.
__device__ inline void copy_bytes(Byte* to, const Byte* from, long long size) {
    unsigned long long address = (unsigned long long)from;
    long long done = address % 16 == 0 ? copy_units<uint4>(to, from, size)
                   : address % 4 == 0 ? copy_units<unsigned int>(to, from, size)
                   : address % 2 == 0 ? copy_units<unsigned short>(to, from, size) : 0;
    copy_units<Byte>(to + done, from + done, size - done);
}
"""

# Defined for the next two: WEIGHT (float or double). Grid: a block per row.
_PACK_CHOICES = r"""
__device__ inline void pack_choices(
    Byte* row, const WEIGHT* weights, const int* slots, long long top_k, long long weights_at, long long slots_at) {
    for (long long k = threadIdx.x; k < top_k; k += blockDim.x) {
        ((WEIGHT*)(row + weights_at))[k] = slots[k] < 0 ? (WEIGHT)0 : weights[k];
        ((int*)(row + slots_at))[k] = slots[k];
    }
}
"""

_PACK_EXACT = r"""
extern "C" __global__ void pack_exact(
    const Byte* x, long long x_stride, long long hidden_bytes, const WEIGHT* weights, const long long* tokens,
    const int* slots, long long top_k, Byte* packed, long long row_bytes, long long weights_at, long long slots_at) {
    long long n = blockIdx.x, token = tokens[n];
    Byte* row = packed + n * row_bytes;
    copy_bytes(row, x + token * x_stride, hidden_bytes);
    pack_choices(row, weights + token * top_k, slots + n * top_k, top_k, weights_at, slots_at);
}
"""

# Defined: ROW (of x), WIRE (of the payload). The same steps as formats.encode_into, in the same order.
_PACK_SCALED = r"""
extern "C" __global__ void pack_scaled(
    const ROW* x, long long x_stride, long long hidden, float largest, const WEIGHT* weights, const long long* tokens,
    const int* slots, long long top_k, Byte* packed, long long row_bytes, long long scales_at, long long weights_at,
    long long slots_at) {
    __shared__ unsigned int seen[128];
    long long n = blockIdx.x, token = tokens[n];
    const ROW* from = x + token * x_stride;
    Byte* row = packed + n * row_bytes;
    WIRE* payload = (WIRE*)row;
    // 16 threads share 128 values, which have one scale; neighbours read neighbouring values.
    unsigned int group = threadIdx.x / 16, lane = threadIdx.x % 16;
    for (long long start = 0; start < hidden; start += 1024) {
        long long begin = start + group * 128;
        float values[8];
        unsigned int size = 0;  // absolute values compare as their bits do, and any nan is larger than inf
        for (int i = 0; i < 8; i++) {
            long long at = begin + lane + 16 * i;
            values[i] = at < hidden ? (float)widen(from[at]) : 0.0f;
            unsigned int bits = __float_as_uint(values[i]) & 0x7fffffffu;
            size = bits > size ? bits : size;
        }
        seen[threadIdx.x] = size;
        __syncthreads();
        for (int i = 0; i < 16; i++) {
            unsigned int bits = seen[group * 16 + i];
            size = bits > size ? bits : size;
        }
        __syncthreads();  // before the next round writes `seen`
        float scale = __fdiv_rn(__uint_as_float(size), largest);
        if (scale < 1.17549435e-38f) scale = 1.17549435e-38f;  // float32's smallest normal number; a nan stays
        if (lane == 0 && begin < hidden) ((float*)(row + scales_at))[begin / 128] = scale;
        for (int i = 0; i < 8; i++) {
            long long at = begin + lane + 16 * i;
            float value = __fdiv_rn(values[i], scale);
            value = value < -largest ? -largest : value > largest ? largest : value;
            if (at < hidden) narrow(value == value ? value : 0.0f, payload + at);
        }
    }
    pack_choices(row, weights + token * top_k, slots + n * top_k, top_k, weights_at, slots_at);
}
"""

_UNPACK_SCALED = r"""
extern "C" __global__ void unpack_scaled(
    const Byte* packed, long long row_bytes, long long hidden, long long top_k, long long scales_at,
    long long weights_at, long long slots_at, ROW* rows, WEIGHT* weights, int* slots) {
    long long n = blockIdx.x;
    const Byte* row = packed + n * row_bytes;
    for (long long h = threadIdx.x; h < hidden; h += blockDim.x) {
        float scale = ((const float*)(row + scales_at))[h / 128];
        narrow(multiply(widen(((const WIRE*)row)[h]), scale), rows + n * hidden + h);
    }
    for (long long k = threadIdx.x; k < top_k; k += blockDim.x) {
        weights[n * top_k + k] = ((const WEIGHT*)(row + weights_at))[k];
        slots[n * top_k + k] = ((const int*)(row + slots_at))[k];
    }
}
"""

# Defined: ROW, SUM (float or double), OUT, WEIGHTED (0: `weights` is not read). Grid: a block per token. The rows of
# token t are order[starts[t]] ... order[starts[t + 1] - 1], and they are added up in that order.
_SUM_ROWS = r"""
extern "C" __global__ void sum_rows(
    const ROW* rows, long long row_stride, long long hidden, const long long* order, const long long* starts,
    const SUM* weights, OUT* sums) {
    long long token = blockIdx.x, begin = starts[token], end = starts[token + 1];
    for (long long h = threadIdx.x; h < hidden; h += blockDim.x) {
        SUM sum = 0;
        for (long long i = begin; i < end; i++) {
            SUM value = widen(rows[order[i] * row_stride + h]);
            sum = add(sum, WEIGHTED ? multiply(value, weights[order[i]]) : value);
        }
        narrow(sum, sums + token * hidden + h);
    }
}
"""

_KERNELS = {
    "pack_exact": _PACK_CHOICES + _PACK_EXACT,
    "pack_scaled": _PACK_CHOICES + _PACK_SCALED,
    "unpack_scaled": _UNPACK_SCALED,
    "sum_rows": _SUM_ROWS,
}


def source(kernel: str, macros: tuple[tuple[str, str], ...]) -> str:
    """The whole text of one kernel for given types: macros are (name, text) pairs such as ("ROW", "Bfloat16")."""
    return "".join(f"#define {name} {text}\n" for name, text in macros) + _COMMON + _KERNELS[kernel]
