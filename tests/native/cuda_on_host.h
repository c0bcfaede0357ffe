// Runs a CUDA kernel on the host: a fiber per thread of a block, one block after the other. Put before the kernel's
// text; `CUDA_ON_HOST(kernel)` after it defines what the test calls. Slow on purpose: what it checks is the arithmetic.

#include <math.h>
#include <string.h>
#include <ucontext.h>

#include <utility>

#define __global__
#define __device__
#define __shared__ static  // one block at a time; left over from the last block, as on a device

struct alignas(16) uint4 { unsigned int x, y, z, w; };
struct Place { unsigned int x, y, z; };
static Place threadIdx, blockIdx, blockDim, gridDim;

static inline unsigned int __float_as_uint(float value) { unsigned int bits; memcpy(&bits, &value, 4); return bits; }
static inline float __uint_as_float(unsigned int bits) { float value; memcpy(&value, &bits, 4); return value; }
static inline float __fadd_rn(float a, float b) { return a + b; }  // compiled with -ffp-contract=off
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }

static const int MOST_THREADS = 256;
static ucontext_t scheduler, fibers[MOST_THREADS];
static char stacks[MOST_THREADS][1 << 16];
static bool ended[MOST_THREADS];
static int running;
static void (*thread_body)(void**);
static void** thread_arguments;

static inline void __syncthreads() { swapcontext(&fibers[running], &scheduler); }

static void thread_main() {
    thread_body(thread_arguments);
    ended[running] = true;
}

// The compiler calls this where -fsanitize=alignment finds a load or a store that a device would refuse. It does not
// return: the host may refuse it too.
static bool misaligned;
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void*) {
    misaligned = true;
    setcontext(&scheduler);
}

enum Outcome { FINE = 0, MISALIGNED = 1, DIVERGED = 2 };

// Runs every thread up to its next __syncthreads, in order or backwards, until all have ended. DIVERGED: some threads
// of a block ended while others waited.
static int run_blocks(void (*body)(void**), int blocks, int threads, int backwards, void** arguments) {
    thread_body = body;
    thread_arguments = arguments;
    misaligned = false;
    gridDim = Place{(unsigned int)blocks, 1, 1};
    blockDim = Place{(unsigned int)threads, 1, 1};
    for (int block = 0; block < blocks; block++) {
        blockIdx = Place{(unsigned int)(backwards ? blocks - 1 - block : block), 0, 0};
        for (int thread = 0; thread < threads; thread++) {
            ended[thread] = false;
            getcontext(&fibers[thread]);
            fibers[thread].uc_stack.ss_sp = stacks[thread];
            fibers[thread].uc_stack.ss_size = sizeof stacks[thread];
            fibers[thread].uc_link = &scheduler;
            makecontext(&fibers[thread], thread_main, 0);
        }
        for (int left = threads; left;) {
            for (int i = 0; i < threads; i++) {
                running = backwards ? threads - 1 - i : i;
                threadIdx = Place{(unsigned int)running, 0, 0};
                swapcontext(&scheduler, &fibers[running]);
                if (misaligned) return MISALIGNED;
                left -= ended[running];
            }
            if (left && left != threads) return DIVERGED;
        }
    }
    return FINE;
}

// The kernel's parameters as cuLaunchKernel takes them: an address of each. parameter_bytes: their sizes, 0 after the
// last, and -8 for a pointer.
template <typename... P, size_t... I>
static void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) { kernel(*(P*)arguments[I]...); }

template <typename T> struct Size { static const int value = sizeof(T); };
template <typename T> struct Size<T*> { static const int value = -8; };

template <typename... P>
static int size_of(void (*)(P...), int i) { const int sizes[] = {Size<P>::value..., 0}; return sizes[i]; }

template <typename... P>
static void call_all(void (*kernel)(P...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<P...>());
}

#define CUDA_ON_HOST(kernel)                                                                  \
    extern "C" int parameter_bytes(int i) { return size_of(kernel, i); }                      \
    static void body_of_kernel(void** arguments) { call_all(kernel, arguments); }             \
    extern "C" int launch(int blocks, int threads, int backwards, void** arguments) {         \
        return run_blocks(body_of_kernel, blocks, threads, backwards, arguments);             \
    }
