/* Runs a program as on an AMD processor with AVX2 (Zen 3), to see what libraries do there.

     gcc -O1 -shared -fPIC -o as_avx2.so as_avx2.c
     LD_PRELOAD=./as_avx2.so python speed.py --output avx2

   Libraries ask the CPUID instruction what the processor is. Linux can let it fault
   (arch_prctl(2), on Intel processors since Ivy Bridge), and the handler below gives other answers:
   AMD's name, caches of 32 KB, 512 KB and 32 MB, no AVX-512, AMX or VNNI. All libraries then take
   their code for such a processor: ATen, oneDNN, MKL, ONNX Runtime and OpenVINO alike, which no
   environment variable does. The clock, caches and memory are still this machine's. */

#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define BIT(n) (1u << (n))

enum { EAX, EBX, ECX, EDX };

static struct sigaction former;

static void set_cpuid(long works) { syscall(SYS_arch_prctl, ARCH_SET_CPUID, works); }

static void ask(uint32_t leaf, uint32_t sub, uint32_t *r) {
  set_cpuid(1);
  __asm__ volatile("cpuid"
                   : "=a"(r[EAX]), "=b"(r[EBX]), "=c"(r[ECX]), "=d"(r[EDX])
                   : "a"(leaf), "c"(sub));
  set_cpuid(0);
}

/* AMD's leaf of caches: level 1 for data, for code, level 2 of a core, level 3 of two. */
static const uint32_t CACHES[4][4] = {
    {0x00000121, 0x01c0003f, 63, 0},
    {0x00000122, 0x01c0003f, 63, 0},
    {0x00000143, 0x01c0003f, 1023, 2},
    {0x00004163, 0x03c0003f, 32767, 1},
};

static void answer(uint32_t leaf, uint32_t sub, uint32_t *r) {
  ask(leaf, sub, r);
  switch (leaf) {
  case 0: /* the vendor */
    memcpy(&r[EBX], "Auth", 4);
    memcpy(&r[EDX], "enti", 4);
    memcpy(&r[ECX], "cAMD", 4);
    break;
  case 1: /* family and model */
    r[EAX] = 0x00a00f11;
    break;
  case 7: /* what goes beyond AVX2 */
    if (sub == 0) {
      r[EBX] &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));
      r[ECX] &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));
      r[EDX] &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));
    } else if (sub == 1) {
      r[EAX] &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23));
      r[EDX] &= ~(BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(19));
    }
    break;
  case 0x0d: /* registers that the system saves */
    if (sub == 0) r[EAX] &= 7;
    break;
  case 4: /* Intel's leaves of caches and of tiles */
  case 0x1d:
  case 0x1e:
    memset(r, 0, 4 * sizeof *r);
    break;
  case 0x80000000:
    r[EAX] = 0x80000020;
    break;
  case 0x80000001: /* that AMD's leaf of caches is there */
    r[ECX] |= BIT(22);
    break;
  case 0x80000005:
    r[ECX] = r[EDX] = 0x20080140;
    break;
  case 0x80000006:
    r[ECX] = 0x02006140;
    r[EDX] = 0x01009140;
    break;
  case 0x8000001d:
    if (sub < 4) memcpy(r, CACHES[sub], sizeof CACHES[sub]);
    else memset(r, 0, 4 * sizeof *r);
    break;
  }
}

static void on_fault(int number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *code = (const uint8_t *)registers[REG_RIP];
  if (code[0] != 0x0f || code[1] != 0xa2) { /* another fault: not ours */
    sigaction(number, &former, NULL);
    return;
  }
  uint32_t r[4];
  answer((uint32_t)registers[REG_RAX], (uint32_t)registers[REG_RCX], r);
  registers[REG_RAX] = r[EAX];
  registers[REG_RBX] = r[EBX];
  registers[REG_RCX] = r[ECX];
  registers[REG_RDX] = r[EDX];
  registers[REG_RIP] += 2;
  (void)info;
}

__attribute__((constructor)) static void start(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &former);
  if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) {
    static const char text[] = "as_avx2: this system cannot let CPUID fault\n";
    if (write(2, text, sizeof text - 1)) {}
    _exit(3);
  }
}
