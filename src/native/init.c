/* The program of a container's first process until the user's own takes its place.
 *
 * It knows nothing of containers. It maps a page of memory shared with the runtime, waits on a socket for the word
 * to go, performs the system calls that the runtime wrote into that memory, says how far it came, and waits again.
 * The story that it is told is boxship/runtime/init.py; the language of the programs is boxship/linux/remote.py.
 *
 * Why not Python: whatever runs inside the container's namespaces can be looked at, and its /proc/self/exe be opened
 * for writing, by the container (CVE-2019-5736, CVE-2016-9962). This program is started from a sealed copy in memory,
 * links to nothing, reads no file and no environment, and holds no descriptor but those that it was given.
 *
 * Descriptors at start: 0, 1, 2 as the container is to have them, 3 the control socket (SOCK_SEQPACKET), 4 the memory.
 * A word to go is {u32 first; u32 fds} with `fds` descriptors attached; the answer is {u32 index; i32 error}, error 0
 * when the program came to an END. When the socket closes, the process exits: no orphan waits for a dead runtime.
 */
#include <stdint.h>

#define AREA ((uint8_t *)0x200000000000)
#define AREA_SIZE (16UL << 20)

/* Pseudo calls: what a straight line of system calls cannot say. */
enum { END = 0x10000, FORK, STORE, LOAD, EXPECT, SET, ANSWER };
enum { REG_CTL = 1, REG_RECEIVED = 64, REGS = 512 };

struct op {
	uint32_t nr;
	uint16_t dst;     /* register for the result; register 0 is never read */
	uint16_t regs;    /* bit i: args[i] is the number of a register */
	uint32_t on_ok;   /* index of the next operation; 0: the one that follows */
	uint32_t on_err;  /* the same for a failed call; 0: stop here and answer */
	int64_t result;   /* what the kernel returned */
	uint64_t args[6];
};

/* Private, so that a forked child has its own. Results go to memory that parent and child share, but each to the
 * places of its own operations. */
static int64_t regs[REGS];
static int forked;

#if defined(__x86_64__)
enum { NR_rt_sigaction = 13, NR_write = 1, NR_close = 3, NR_mmap = 9, NR_recvmsg = 47, NR_clone = 56, NR_fcntl = 72, NR_exit_group = 231 };
static inline long call(long nr, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long ret;
	__asm__ volatile("syscall" : "=a"(ret) : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return ret;
}
__asm__(".globl _start\n_start:\n xor %ebp,%ebp\n and $-16,%rsp\n call serve\n hlt\n");
#elif defined(__aarch64__)
enum { NR_rt_sigaction = 134, NR_close = 57, NR_mmap = 222, NR_write = 64, NR_recvmsg = 212, NR_clone = 220, NR_fcntl = 25, NR_exit_group = 94 };
static inline long call(long nr, long a, long b, long c, long d, long e, long f)
{
	register long x8 __asm__("x8") = nr;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	register long x5 __asm__("x5") = f;
	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
	return x0;
}
__asm__(".globl _start\n_start:\n mov x29,#0\n mov x30,#0\n bl serve\n brk #0\n");
#else
#error "boxship knows x86_64 and aarch64; add the system call convention of this machine here"
#endif

enum { NR_openat2 = 437, EINTR_ = 4, EAGAIN_ = 11, EINVAL_ = 22, F_DUPFD_CLOEXEC_ = 1030, MSG_CMSG_CLOEXEC_ = 0x40000000 };

static void quit(int code)
{
	for (;;)
		call(NR_exit_group, code, 0, 0, 0, 0, 0);
}

static void answer(uint32_t index, int32_t error)
{
	struct { uint32_t index; int32_t error; } message = {index, error};
	if (forked)
		quit(error ? 127 : 0);
	/* write(2), not sendmsg(2): it may be a FIFO by now, and a seccomp filter more often allows it. */
	if (call(NR_write, regs[REG_CTL], (long)&message, sizeof message, 0, 0, 0) < 0)
		quit(126);
}

static void run(uint32_t index)
{
	for (;;) {
		struct op *op = (struct op *)AREA + index;
		long a[6], ret;
		for (int i = 0; i < 6; i++)
			a[i] = op->regs >> i & 1 ? regs[op->args[i] % REGS] : (long)op->args[i];
		switch (op->nr) {
		case END:
			answer(index, 0);
			return;
		case SET:
			ret = a[0];
			break;
		case ANSWER:
			/* As END, but the program goes on by itself; nobody listens any more. */
			answer(index, 0);
			ret = 0;
			break;
		case STORE:
			*(int32_t *)a[0] = (int32_t)a[1];
			ret = 0;
			break;
		case LOAD:
			ret = *(uint32_t *)a[0] & (uint32_t)a[1];
			break;
		case EXPECT:
			/* args: address, mask, value, whether it must differ, the error to fail with */
			ret = ((*(uint32_t *)a[0] & (uint32_t)a[1]) == (uint32_t)a[2]) != !a[3] ? -a[4] : 0;
			break;
		case FORK:
			/* args: flags, whether the child goes on as the process that answers, where CLONE_PARENT_SETTID
			 * writes. The child follows, the parent takes on_ok. Without CLONE_VM no stack is needed: both
			 * keep a copy of this one. */
			ret = call(NR_clone, a[0], 0, a[2], 0, 0, 0);
			if (ret == 0) {
				forked = !a[1];
				index++;
				continue;
			}
			break;
		default:
			/* openat2(2) gives up when anything on the machine is renamed while it passes a "..": try again,
			 * but not for as long as a hostile container pleases. */
			for (int tries = 1000;; tries--) {
				ret = call(op->nr, a[0], a[1], a[2], a[3], a[4], a[5]);
				if (ret != -EINTR_ && !(ret == -EAGAIN_ && op->nr == NR_openat2 && tries))
					break;
			}
		}
		op->result = ret;
		if (ret < 0 && ret >= -4095) {
			if (!op->on_err) {
				answer(index, (int32_t)-ret);
				return;
			}
			index = op->on_err;
		} else {
			regs[op->dst % REGS] = ret;
			index = op->on_ok ? op->on_ok : index + 1;
		}
	}
}

/* One word to go, with the descriptors that came along put into the registers from REG_RECEIVED on. */
static uint32_t receive(void)
{
	struct { uint32_t first, fds; } word;
	struct { void *base; uint64_t len; } vec = {&word, sizeof word};
	struct { uint64_t len; int32_t level, type; int32_t fds[254]; } control;
	struct {
		void *name; uint32_t namelen; void *vec; uint64_t vecs; void *control; uint64_t controllen; int32_t flags;
	} msg = {0, 0, &vec, 1, &control, sizeof control, 0};
	long got;
	control.len = 0;
	do
		got = call(NR_recvmsg, regs[REG_CTL], (long)&msg, MSG_CMSG_CLOEXEC_, 0, 0, 0);
	while (got == -EINTR_);
	if (got != sizeof word)
		quit(1);
	for (uint32_t i = 0; i < word.fds; i++)
		regs[REG_RECEIVED + i % (REGS - REG_RECEIVED)] =
			msg.controllen && i < (control.len - 16) / 4 ? control.fds[i] : -1;
	return word.first;
}

/* As pid 1 of its namespace a process is deaf to signals that it has no handler for; but whoever asks a container to end
 * that has not been started yet means it. The handlers are gone with the exec. */
static void end(int signal)
{
	quit(128 + signal);
}

static void heed_signals(void)
{
	static const uint8_t signals[] = {1, 2, 3, 10, 12, 13, 14, 15};  /* HUP INT QUIT USR1 USR2 PIPE ALRM TERM */
	/* x86_64 wants a place to return to (SA_RESTORER); nothing returns. */
	struct { void (*handler)(int); uint64_t flags; void (*restorer)(int); uint64_t mask; } action = {end, 0x04000000, end, 0};
	for (unsigned i = 0; i < sizeof signals; i++)
		call(NR_rt_sigaction, signals[i], (long)&action, 0, 8, 0, 0);
}

__attribute__((used)) void serve(void)
{
	heed_signals();
	/* Low numbers belong to the container; the socket goes up, and closes at exec. */
	long ctl = call(NR_fcntl, 3, F_DUPFD_CLOEXEC_, 1000, 0, 0, 0);
	if (ctl == -EINVAL_)  /* a limit below 1000 open files */
		ctl = call(NR_fcntl, 3, F_DUPFD_CLOEXEC_, 5, 0, 0, 0);
	/* A register that nothing was put into is no descriptor: 0 would be the container's standard input. */
	for (int i = 0; i < REGS; i++) {
		regs[i] = -1;
		__asm__ volatile("" ::: "memory");  /* or the compiler makes it a call of memset(3) */
	}
	regs[REG_CTL] = ctl;
	/* PROT_READ|PROT_WRITE, MAP_SHARED|MAP_FIXED_NOREPLACE: programs hold absolute addresses. */
	if (ctl < 0 || call(NR_mmap, (long)AREA, AREA_SIZE, 3, 0x100001, 4, 0) != (long)AREA)
		quit(125);
	call(NR_close, 3, 0, 0, 0, 0, 0);
	call(NR_close, 4, 0, 0, 0, 0, 0);
	for (;;)
		run(receive());
}
