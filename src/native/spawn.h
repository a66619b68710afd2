/* clone3 + execveat of an open program, for the interpreter (sys.c) and for the native entry (boxrun.c).
 *
 * The child shares the caller's memory until the exec (CLONE_VM, CLONE_VFORK): no page tables are copied, and between the
 * two it makes system calls only.
 */
#ifndef BOXSHIP_SPAWN_H
#define BOXSHIP_SPAWN_H

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define SPAWN_MAX_FDS 16

/* struct clone_args of clone3(2), first version with a cgroup (Linux 5.7). */
struct spawn_clone_args {
	uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
};

struct spawn_plan {
	int exe;
	char *const *argv;
	char *const *envp;
	const int *fds;      /* fds[i] becomes descriptor i */
	int fd_count;
	volatile int error;
};

static int spawn_child(void *argument)
{
	struct spawn_plan *plan = argument;
	/* Dispositions and mask are inherited by the program: give it the defaults. Python ignores SIGPIPE and SIGXFSZ. */
	struct { void *handler; unsigned long flags; void *restorer; unsigned long mask; } dfl = {0};
	for (int sig = 1; sig < 65; sig++)
		syscall(SYS_rt_sigaction, sig, &dfl, NULL, 8);
	unsigned long none = 0;
	/* First out of the way of the low numbers, then into place. */
	int high[SPAWN_MAX_FDS];
	for (int i = 0; i < plan->fd_count; i++) {
		high[i] = (int)syscall(SYS_fcntl, plan->fds[i], F_DUPFD_CLOEXEC, plan->fd_count);
		if (high[i] < 0)
			goto fail;
	}
	int exe = (int)syscall(SYS_fcntl, plan->exe, F_DUPFD_CLOEXEC, plan->fd_count);
	if (exe < 0)
		goto fail;
	for (int i = 0; i < plan->fd_count; i++)
		if (syscall(SYS_dup3, high[i], i, 0) < 0)
			goto fail;
	/* Everything else closes at exec: no descriptor of the caller reaches a container. */
	if (syscall(SYS_close_range, plan->fd_count, ~0U, 4 /* CLOSE_RANGE_CLOEXEC */) < 0)
		goto fail;
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, 8);
	syscall(SYS_execveat, exe, "", plan->argv, plan->envp, 0x1000 /* AT_EMPTY_PATH */);
fail:
	plan->error = errno;
	_exit(127);
}

/* clone3(2) with a stack of its own, which no libc wraps: the child begins in spawn_child(plan). */
static long spawn_clone3(struct spawn_clone_args *args, struct spawn_plan *plan)
{
	long ret;
#if defined(__x86_64__)
	register void *argument __asm__("r12") = plan;
	register void *entry __asm__("r13") = spawn_child;
	__asm__ volatile(
		"syscall\n\t"
		"test %%rax, %%rax\n\t"
		"jnz 1f\n\t"
		"xor %%ebp, %%ebp\n\t"
		"mov %%r12, %%rdi\n\t"
		"call *%%r13\n\t"
		"hlt\n"
		"1:"
		: "=a"(ret) : "a"(SYS_clone3), "D"(args), "S"(sizeof *args), "r"(argument), "r"(entry) : "rcx", "r11", "memory");
#elif defined(__aarch64__)
	register long x0 __asm__("x0") = (long)args;
	register long x1 __asm__("x1") = sizeof *args;
	register long x8 __asm__("x8") = SYS_clone3;
	register void *argument __asm__("x19") = plan;
	register void *entry __asm__("x20") = spawn_child;
	__asm__ volatile("svc 0\n\tcbnz x0, 1f\n\tmov x29, #0\n\tmov x0, x19\n\tblr x20\n\tbrk #0\n1:"
			 : "+r"(x0) : "r"(x1), "r"(x8), "r"(argument), "r"(entry) : "x30", "memory");
	ret = x0;
#endif
	return ret;
}

/* The new process's pid, or -1 with errno. `flags`: new namespaces. `cgroup`: an open directory of the v2 hierarchy to be
 * born in, -1 for the caller's: moving into it later would wait for an RCU grace period. */
static pid_t spawn(int exe, char *const *argv, const int *fds, int fd_count, int flags, int cgroup)
{
	static char *const envp[] = {NULL};
	struct spawn_plan plan = {exe, argv, envp, fds, fd_count, 0};
	/* With every signal blocked no handler can run on the shared memory of the child. */
	unsigned long all = ~0UL, old = 0;
	syscall(SYS_rt_sigprocmask, SIG_BLOCK, &all, &old, 8);
	static _Alignas(16) char stack[16384];
	struct spawn_clone_args args = {
		.flags = CLONE_VM | CLONE_VFORK | (unsigned)flags | (cgroup >= 0 ? 0x200000000u : 0 /* CLONE_INTO_CGROUP */),
		.exit_signal = SIGCHLD, .stack = (uintptr_t)stack, .stack_size = sizeof stack,
		.cgroup = cgroup >= 0 ? (unsigned)cgroup : 0,
	};
	long pid = spawn_clone3(&args, &plan);
	int saved = pid < 0 ? (int)-pid : plan.error;
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &old, NULL, 8);
	if (pid >= 0 && plan.error) {
		waitpid((pid_t)pid, NULL, 0);
		pid = -1;
	}
	errno = saved;
	return pid < 0 ? -1 : (pid_t)pid;
}

#endif
