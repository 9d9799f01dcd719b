// includes ISA_SOURCE once per instruction set, as vector.h says; each time it ends with the #undef
// of ISA, ISA_TARGET and ISA_BYTES. The order is that of the table in isa.h
#define ISA baseline
#define ISA_TARGET
#define ISA_BYTES 16
#include ISA_SOURCE

#if defined(__x86_64__)
#define ISA avx2
#define ISA_TARGET __attribute__((target("avx2,fma")))
#define ISA_BYTES 32
#include ISA_SOURCE

#define ISA avx512
#define ISA_TARGET __attribute__((target("avx512f")))
#define ISA_BYTES 64
#include ISA_SOURCE
#endif

#undef ISA_SOURCE
