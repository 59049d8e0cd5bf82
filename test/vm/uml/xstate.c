// Preloaded into user-mode Linux. Kernels since 6.0 take a traced process's
// extended registers only as a whole, and on CPUs with AMX the whole is larger
// than the buffer of user-mode Linux 6.1: its guests died at their first
// instruction ("ptrace set fp regs failed, errno = 14"). What it sets is
// completed here with what the process has.
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static _Alignas(64) char whole[64 << 10]; // user-mode Linux traces from one thread

// raw_ptrace returns the negative of the error, and does not go by errno: a
// signal, such as that of a network packet, may change that right after the call.
static long raw_ptrace(long request, pid_t pid, void *addr, void *data)
{
	long r;
	register void *r10 __asm__("r10") = data;
	__asm__ volatile("syscall" : "=a"(r) : "a"(SYS_ptrace), "D"(request), "S"((long)pid), "d"(addr), "r"(r10) : "rcx", "r11", "memory");
	return r;
}

long ptrace(enum __ptrace_request request, ...)
{
	va_list ap;
	va_start(ap, request);
	pid_t pid = va_arg(ap, pid_t);
	void *addr = va_arg(ap, void *);
	void *data = va_arg(ap, void *);
	va_end(ap);

	if (request >= PTRACE_PEEKTEXT && request <= PTRACE_PEEKUSER) { // as libc does: the word is the result
		long word, failed = syscall(SYS_ptrace, request, pid, addr, &word);
		if (failed)
			return failed;
		errno = 0;
		return word;
	}
	long r = raw_ptrace(request, pid, addr, data);
	if (r == 0 || r != -EFAULT || request != PTRACE_SETREGSET || (long)addr != NT_X86_XSTATE) {
		if (r)
			errno = -r;
		return r ? -1 : 0;
	}
	struct iovec *part = data, all = {whole, sizeof whole};
	if (raw_ptrace(PTRACE_GETREGSET, pid, addr, &all)) {
		errno = EFAULT;
		return -1;
	}
	if (part->iov_len < all.iov_len)
		memcpy(whole, part->iov_base, part->iov_len);
	return syscall(SYS_ptrace, request, pid, addr, &all);
}
