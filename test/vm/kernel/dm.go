package kernel

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

// dmHeader is struct dm_ioctl of linux/dm-ioctl.h, without its last seven bytes
// of padding.
type dmHeader struct {
	Version     [3]uint32
	DataSize    uint32
	DataStart   uint32
	TargetCount uint32
	OpenCount   int32
	Flags       uint32
	EventNr     uint32
	_           uint32
	Dev         uint64
	Name        [unix.DM_NAME_LEN]byte
	UUID        [unix.DM_UUID_LEN]byte
}

// dmHeaderSize is the size of struct dm_ioctl.
const dmHeaderSize = 312

// dmList performs one of the two list commands of device-mapper and returns
// what it lists.
func dmList(command uintptr) ([]byte, error) {
	control, err := os.OpenFile(filepath.Join("/dev", unix.DM_DIR, unix.DM_CONTROL_NODE), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	for size := 16 << 10; size <= 1<<20; size *= 2 {
		var request bytes.Buffer
		h := dmHeader{Version: [3]uint32{4, 0, 0}, DataSize: uint32(size), DataStart: dmHeaderSize}
		if err := binary.Write(&request, binary.NativeEndian, h); err != nil {
			return nil, err
		}
		buf := make([]byte, size)
		copy(buf, request.Bytes())
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), command, uintptr(unsafe.Pointer(&buf[0]))); errno != 0 {
			return nil, fmt.Errorf("device-mapper ioctl %#x: %w", command, errno)
		}
		if err := binary.Read(bytes.NewReader(buf), binary.NativeEndian, &h); err != nil {
			return nil, err
		}
		if h.Flags&unix.DM_BUFFER_FULL_FLAG != 0 {
			continue
		}
		if h.DataStart > h.DataSize || int(h.DataSize) > len(buf) {
			return nil, fmt.Errorf("device-mapper ioctl %#x: a result from %d to %d in %d bytes", command, h.DataStart, h.DataSize, len(buf))
		}
		return buf[h.DataStart:h.DataSize], nil
	}
	return nil, fmt.Errorf("device-mapper ioctl %#x: the list does not end", command)
}

// dmTargets returns the names of the targets that are loaded, such as "crypt".
func dmTargets() ([]string, error) {
	list, err := dmList(unix.DM_LIST_VERSIONS)
	if err != nil {
		return nil, err
	}
	const nameAt = 16 // struct dm_target_versions: next, version[3], name
	return dmNames(list, nameAt, 0)
}

// dmDevices returns the names of all mappings.
func dmDevices() ([]string, error) {
	list, err := dmList(unix.DM_LIST_DEVICES)
	if err != nil {
		return nil, err
	}
	const nameAt, nextAt = 12, 8 // struct dm_name_list: dev, next, name
	if len(list) >= nameAt && list[nameAt] == 0 {
		return nil, nil // an empty list is one entry without a name
	}
	return dmNames(list, nameAt, nextAt)
}

// dmNames walks a list whose entries hold at nextAt the distance to the next
// entry, 0 in the last one, and at nameAt a string that ends with a zero byte.
func dmNames(list []byte, nameAt, nextAt int) ([]string, error) {
	var names []string
	for len(list) > 0 {
		if len(list) < nameAt {
			return nil, fmt.Errorf("device-mapper: an entry of %d bytes", len(list))
		}
		name, _, _ := bytes.Cut(list[nameAt:], []byte{0})
		names = append(names, string(name))
		next := int(binary.NativeEndian.Uint32(list[nextAt:]))
		if next == 0 {
			break
		}
		if next < nameAt || next > len(list) {
			return nil, fmt.Errorf("device-mapper: the next of %d bytes is at %d", len(list), next)
		}
		list = list[next:]
	}
	return names, nil
}
