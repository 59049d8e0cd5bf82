package worker

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/secret"
)

// warmUp uses the time that a worker waits for its request: it formats, seals,
// reads, loads and unlocks a header in memory with a key that is no secret. So
// the library is initialised and the code is in memory when the request comes;
// a process that has just started spends most of its time on page faults. It
// touches no device, and what goes wrong in it will be told by the request.
func warmUp(l *log) {
	header, err := memory("warm-up")
	if err != nil {
		return
	}
	defer func() { _ = header.Close() }()
	data, err := memory("warm-up-data")
	if err != nil {
		return
	}
	defer func() { _ = data.Close() }()
	if header.Truncate(luks2.DataOffset) != nil || data.Truncate(minimumSize) != nil {
		return
	}
	want := luks2.Want{ID: "warm-up", Spec: dek.Spec{Cipher: dek.CipherXTS}, SectorSize: 512}
	key := secret.Take(make([]byte, dek.Size))
	defer key.Wipe()
	token := luks2.NewToken(want.ID)
	d, err := openLUKS(fdPath(header), fdPath(data), l)
	if err != nil {
		return
	}
	defer d.free()
	if d.format(dek.NewUUID(), fdPath(data), "", 512, 64, luks2.DataOffset) != nil || d.addKeyslot(key) != nil || d.setToken(token.Unsealed()) != nil {
		return
	}
	h, err := luks2.Seal(header, want, key)
	if err != nil || h.Write(header, func(string) {}) != nil {
		return
	}
	found, err := luks2.Read(header, want, key)
	if err != nil || found.Header == nil {
		return
	}
	warmUnlock(found.Header, data, key, l)
}

// warmUnlock loads a header as an open does and tries the key on its keyslot.
func warmUnlock(h *luks2.Header, data *os.File, key secret.Bytes, l *log) {
	file, err := memory("warm-up-copy")
	if err != nil {
		return
	}
	defer func() { _ = file.Close() }()
	if h.Materialise(file) != nil {
		return
	}
	d, err := openLUKS(fdPath(file), fdPath(data), l)
	if err != nil {
		return
	}
	defer d.free()
	if d.load() == nil {
		_ = d.activate("", key, 0)
	}
}

// pending tells whether something can be read from conn.
func pending(conn *os.File) bool {
	fds := []unix.PollFd{{Fd: int32(conn.Fd()), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0
}
