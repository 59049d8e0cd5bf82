#include <linux/dm-ioctl.h>
#include <stdarg.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

// DM_UDEV_DISABLE_SUBSYSTEM_RULES, _DISK_RULES, _OTHER_RULES and
// DM_UDEV_PRIMARY_SOURCE, which makes them count, where libdevmapper puts them.
#define PRIVATE ((uint32_t)(0x0002 | 0x0004 | 0x0008 | 0x0040) << 16)

// ioctl takes the place of libc's for the libraries of this program. libcryptsetup
// tells udev to leave a mapping alone only where it also waits for udev, which in a
// container it must not (DM_DISABLE_UDEV); the host's udev sees mappings all the same.
// Without this it would look into them and build on what it finds: a pod's LVM would
// keep its volume from being closed.
int ioctl(int fd, unsigned long request, ...)
{
	va_list list;
	va_start(list, request);
	void *arg = va_arg(list, void *);
	va_end(list);
	if ((uint32_t)request == (uint32_t)DM_DEV_SUSPEND) {
		struct dm_ioctl *mapping = arg;
		if (!(mapping->flags & DM_SUSPEND_FLAG)) // it is resumed, which udev is told of
			mapping->event_nr |= PRIVATE;
	}
	return syscall(SYS_ioctl, fd, request, arg);
}
