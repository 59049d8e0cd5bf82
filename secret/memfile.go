package secret

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// MemoryFile puts content, which stays the caller's, into a file in memory that
// nobody can change any more, for libraries that want a secret in a file. path
// leads to it in this process alone, until the file is closed. Unlike Bytes it
// may reach swap space.
func MemoryFile(name string, content []byte) (f *os.File, path string, err error) {
	fd, err := unix.MemfdCreate("cryptcsi-"+name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, "", fmt.Errorf("a file in memory for %s: %w", name, err)
	}
	f = os.NewFile(uintptr(fd), name)
	if _, err = f.Write(content); err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		_ = f.Close()
		return nil, "", fmt.Errorf("a file in memory for %s: %w", name, err)
	}
	return f, fmt.Sprintf("/proc/self/fd/%d", fd), nil
}
