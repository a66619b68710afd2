/* The first process of a container that was asked to have an init: it starts the user's program, passes signals on to it,
 * buries whoever is orphaned, and ends as the program ends.
 *
 *     docker-init [-g] [--] PROGRAM [ARGUMENT …]          -g: signals go to the program's whole process group
 *
 * The kernel gives process 1 no default actions of signals, and makes it the parent of every orphan: a program that expects
 * neither ignores SIGTERM and gathers zombies. The program runs in a process group of its own, in the foreground of the
 * terminal when there is one. Codes are a shell's: 128 + the signal, 127 for a program that is not there, 126 for one that
 * cannot be run.
 *
 * Static and free of libc: one of these lives in each such container, and it takes a few pages.
 */
#include <stdint.h>

#if defined(__x86_64__)
enum { NR_write = 1, NR_ioctl = 16, NR_getpid = 39, NR_rt_sigaction = 13, NR_rt_sigprocmask = 14, NR_clone = 56, NR_execve = 59,
       NR_exit_group = 231, NR_wait4 = 61, NR_kill = 62, NR_setpgid = 109, NR_rt_sigtimedwait = 128 };
static inline long call(long nr, long a, long b, long c, long d, long e)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	long ret;
	__asm__ volatile("syscall" : "=a"(ret) : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8) : "rcx", "r11", "memory");
	return ret;
}
__asm__(".globl _start\n_start:\n xor %ebp,%ebp\n mov %rsp,%rdi\n and $-16,%rsp\n call begin\n hlt\n");
#elif defined(__aarch64__)
enum { NR_write = 64, NR_ioctl = 29, NR_getpid = 172, NR_rt_sigaction = 134, NR_rt_sigprocmask = 135, NR_clone = 220, NR_execve = 221,
       NR_exit_group = 94, NR_wait4 = 260, NR_kill = 129, NR_setpgid = 154, NR_rt_sigtimedwait = 137 };
static inline long call(long nr, long a, long b, long c, long d, long e)
{
	register long x8 __asm__("x8") = nr;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4) : "memory");
	return x0;
}
__asm__(".globl _start\n_start:\n mov x29,#0\n mov x30,#0\n mov x0,sp\n bl begin\n brk #0\n");
#else
#error "boxship knows x86_64 and aarch64; add the system call convention of this machine here"
#endif

enum { ENOENT_ = 2, EINTR_ = 4, EACCES_ = 13, ENOTDIR_ = 20, WNOHANG_ = 1, SIG_SETMASK_ = 2, TIOCSPGRP_ = 0x5410 };
enum { ILL = 4, TRAP = 5, ABRT = 6, BUS = 7, FPE = 8, SEGV = 11, CHLD = 17, TTIN = 21, TTOU = 22, SYS = 31 };

#define BIT(signal) (1UL << ((signal) - 1))

struct action { /* the kernel's, not libc's */
	uint64_t handler, flags, restorer, mask;
};

static void quit(int code)
{
	for (;;)
		call(NR_exit_group, code, 0, 0, 0, 0);
}

static long length(const char *text)
{
	long size = 0;
	while (text[size])
		size++;
	return size;
}

static void say(const char *text)
{
	call(NR_write, 2, (long)text, length(text), 0, 0);
}

static int same(const char *one, const char *other)
{
	while (*one && *one == *other)
		one++, other++;
	return *one == *other;
}

static void handle(int signal, uint64_t handler)
{
	struct action action = { handler, 0, 0, 0 };
	call(NR_rt_sigaction, signal, (long)&action, 0, sizeof action.mask, 0);
}

/* execvp(3): the errno of the most telling failure. */
static long execute(char **argv, char **env)
{
	static char path[4096];
	const char *search = "/usr/local/bin:/bin:/usr/bin";
	long told = ENOENT_;

	for (const char *letter = argv[0]; *letter; letter++)
		if (*letter == '/')
			return -call(NR_execve, (long)argv[0], (long)argv, (long)env, 0, 0);
	for (char **word = env; *word; word++)
		if ((*word)[0] == 'P' && (*word)[1] == 'A' && (*word)[2] == 'T' && (*word)[3] == 'H' && (*word)[4] == '=')
			search = *word + 5;
	for (;;) {
		long size = 0;
		while (search[size] && search[size] != ':')
			size++;
		long name = length(argv[0]);
		if (size + name + 2 <= (long)sizeof path) {
			long at = 0;
			for (; at < size; at++)
				path[at] = search[at];
			if (at)
				path[at++] = '/';
			for (long i = 0; i <= name; i++)
				path[at + i] = argv[0][i];
			long error = -call(NR_execve, (long)path, (long)argv, (long)env, 0, 0);
			if (error != ENOENT_ && error != ENOTDIR_)
				told = error;
			if (error != ENOENT_ && error != ENOTDIR_ && error != EACCES_)
				return error;
		}
		if (!search[size])
			return told;
		search += size + 1;
	}
}

static void become(char **argv, char **env)
{
	uint64_t none = 0;

	call(NR_setpgid, 0, 0, 0, 0, 0);
	/* Of a process in the background SIGTTOU would stop this very call; it is ignored until here. No terminal: no harm. */
	int group = (int)call(NR_getpid, 0, 0, 0, 0, 0);
	call(NR_ioctl, 0, TIOCSPGRP_, (long)&group, 0, 0);
	handle(TTIN, 0);
	handle(TTOU, 0);
	call(NR_rt_sigprocmask, SIG_SETMASK_, (long)&none, 0, sizeof none, 0);
	long error = execute(argv, env);
	say("docker-init: ");
	say(argv[0]);
	say(error == ENOENT_ ? ": no such file or directory\n" : error == EACCES_ ? ": permission denied\n" : ": cannot be run\n");
	quit(error == ENOENT_ ? 127 : 126);
}

__attribute__((used)) static void begin(long *stack)
{
	char **argv = (char **)(stack + 1);
	char **env = argv + stack[0] + 1;
	int group = 0;

	if (*argv)
		argv++;
	for (; *argv && **argv == '-'; argv++) {
		if (same(*argv, "--")) {
			argv++;
			break;
		}
		if (!same(*argv, "-g")) {
			say("docker-init: unknown option ");
			say(*argv);
			say("\n");
			quit(1);
		}
		group = 1;
	}
	if (!*argv) {
		say("Usage:  docker-init [-g] [--] PROGRAM [ARGUMENT...]\n");
		quit(1);
	}
	/* What the processor raises here is a fault of this program, and not the user's business. */
	uint64_t blocked = ~(BIT(ILL) | BIT(TRAP) | BIT(ABRT) | BIT(BUS) | BIT(FPE) | BIT(SEGV) | BIT(SYS) | BIT(TTIN) | BIT(TTOU));
	handle(TTIN, 1);
	handle(TTOU, 1);
	call(NR_rt_sigprocmask, SIG_SETMASK_, (long)&blocked, 0, sizeof blocked, 0);
	long child = call(NR_clone, CHLD, 0, 0, 0, 0);
	if (child < 0) {
		say("docker-init: cannot fork\n");
		quit(126);
	}
	if (!child)
		become(argv, env);
	for (;;) {
		long signal = call(NR_rt_sigtimedwait, (long)&blocked, 0, 0, sizeof blocked, 0);
		if (signal <= 0)
			continue; /* stopped and continued */
		if (signal != CHLD) {
			call(NR_kill, group ? -child : child, signal, 0, 0, 0);
			continue;
		}
		int status;
		long pid;
		while ((pid = call(NR_wait4, -1, (long)&status, WNOHANG_, 0, 0)) > 0)
			if (pid == child)
				quit(status & 0x7f ? 128 + (status & 0x7f) : status >> 8 & 0xff);
	}
}
