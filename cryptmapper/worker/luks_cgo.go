package worker

/*
#cgo pkg-config: libcryptsetup
#include <libcryptsetup.h>
#include <stdlib.h>

// PBKDF2 with the minimum of iterations: the passphrase is 256 random bits, a
// slow KDF would only cost time and memory.
static const struct crypt_pbkdf_type cc_pbkdf = {
	.type = CRYPT_KDF_PBKDF2, .hash = "sha256", .iterations = 1000,
	.flags = CRYPT_PBKDF_NO_BENCHMARK,
};

static int cc_set_pbkdf(struct crypt_device *cd)
{
	return crypt_set_pbkdf_type(cd, &cc_pbkdf);
}

// Fills the nested parameter structures here, where no rule about Go pointers
// inside C structures applies.
static int cc_format(struct crypt_device *cd, const char *uuid, const char *data_device,
		     const char *integrity, uint32_t sector_size, size_t key_size, uint64_t data_offset)
{
	struct crypt_params_luks2 params = {
		.pbkdf = &cc_pbkdf, .integrity = integrity, .data_device = data_device, .sector_size = sector_size,
	};
	int r = crypt_set_data_offset(cd, data_offset);
	if (r < 0)
		return r;
	return crypt_format(cd, CRYPT_LUKS2, "aes", "xts-plain64", uuid, NULL, key_size, &params);
}
*/
import "C"

import (
	"fmt"
	"os"
	"regexp"
	"runtime"
	"strings"
	"unsafe"

	cryptsetup "github.com/martinjungblut/go-cryptsetup"
	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/secret"
)

// libcryptsetup's calls that go-cryptsetup lacks or makes with keys in Go
// strings: a header apart from its data, tokens, keys out of locked memory.
// Log and Wipe are go-cryptsetup's.

// luks is one libcryptsetup context over a header file and a data device.
type luks struct {
	cd  *C.struct_crypt_device
	log *log
}

// errno is a refusal by libcryptsetup with the last thing that it logged.
type errno struct {
	call string
	code unix.Errno
	text string
}

func (e *errno) Error() string {
	if e.text != "" {
		return fmt.Sprintf("%s: %v (%s)", e.call, e.code, e.text)
	}
	return fmt.Sprintf("%s: %v", e.call, e.code)
}

// Unwrap makes errors.Is(err, unix.EBUSY) work.
func (e *errno) Unwrap() error { return e.code }

// log keeps what libcryptsetup says, for error messages.
type log struct{ last, version string }

var libraryVersion = regexp.MustCompile(`cryptsetup library version ([^ ]+?)\.?$`)

// newLog makes libcryptsetup talk to the returned log. It is process-wide, as
// the library's is; a worker runs one operation.
func newLog() *log {
	l := &log{}
	cryptsetup.SetLogCallback(func(level int, message string) {
		message = strings.TrimSpace(message)
		if m := libraryVersion.FindStringSubmatch(message); m != nil {
			l.version = m[1]
		}
		if level == cryptsetup.CRYPT_LOG_ERROR {
			l.last = message
		}
	})
	return l
}

// openLUKS prepares libcryptsetup for the header in headerPath and the data on
// dataPath.
func openLUKS(headerPath, dataPath string, l *log) (*luks, error) {
	C.crypt_token_external_disable()
	cHeader, cData := C.CString(headerPath), C.CString(dataPath)
	defer C.free(unsafe.Pointer(cHeader))
	defer C.free(unsafe.Pointer(cData))
	d := &luks{log: l}
	if err := d.check("crypt_init_data_device", C.crypt_init_data_device(&d.cd, cHeader, cData)); err != nil {
		return nil, err
	}
	return d, nil
}

func (d *luks) check(call string, r C.int) error {
	if r < 0 {
		return &errno{call, unix.Errno(-r), d.log.last}
	}
	return nil
}

func (d *luks) free() { C.crypt_free(d.cd) }

// format makes a new header with a random volume key.
func (d *luks) format(uuid, dataPath, integrity string, sectorSize, keySize int, dataOffset int64) error {
	cUUID, cData := C.CString(uuid), C.CString(dataPath)
	defer C.free(unsafe.Pointer(cUUID))
	defer C.free(unsafe.Pointer(cData))
	var cIntegrity *C.char
	if integrity != "" {
		cIntegrity = C.CString(integrity)
		defer C.free(unsafe.Pointer(cIntegrity))
	}
	return d.check("crypt_format", C.cc_format(d.cd, cUUID, cData, cIntegrity, C.uint32_t(sectorSize), C.size_t(keySize), C.uint64_t(dataOffset/512)))
}

// addKeyslot puts the volume key that format made into keyslot 0 under key.
func (d *luks) addKeyslot(key secret.Bytes) error {
	p, n := passphrase(key)
	r := C.crypt_keyslot_add_by_volume_key(d.cd, 0, nil, 0, p, n)
	runtime.KeepAlive(key)
	return d.check("crypt_keyslot_add_by_volume_key", r)
}

// setToken writes a token into slot 0.
func (d *luks) setToken(json string) error {
	c := C.CString(json)
	defer C.free(unsafe.Pointer(c))
	return d.check("crypt_token_json_set", C.crypt_token_json_set(d.cd, 0, c))
}

// load reads the header file.
func (d *luks) load() error {
	t := C.CString("LUKS2")
	defer C.free(unsafe.Pointer(t))
	return d.check("crypt_load", C.crypt_load(d.cd, t, nil))
}

// activate maps the device as name, or with an empty name only puts the volume
// key into the keyring of this process.
func (d *luks) activate(name string, key secret.Bytes, flags uint32) error {
	var cName *C.char
	if name != "" {
		cName = C.CString(name)
		defer C.free(unsafe.Pointer(cName))
	}
	p, n := passphrase(key)
	r := C.crypt_activate_by_passphrase(d.cd, cName, 0, p, n, C.uint32_t(flags))
	runtime.KeepAlive(key)
	return d.check("crypt_activate_by_passphrase", r)
}

// resize gives the active mapping that many bytes.
func (d *luks) resize(name string, size int64) error {
	c := C.CString(name)
	defer C.free(unsafe.Pointer(c))
	return d.check("crypt_resize", C.crypt_resize(d.cd, c, C.uint64_t(size/512)))
}

// volumeKey returns the volume key; the caller wipes it.
func (d *luks) volumeKey(key secret.Bytes) (secret.Bytes, error) {
	vk := secret.New(int(C.crypt_get_volume_key_size(d.cd)))
	size := C.size_t(vk.Len())
	p, n := passphrase(key)
	out := (*C.char)(unsafe.Pointer(unsafe.SliceData(vk.Expose())))
	r := C.crypt_volume_key_get(d.cd, 0, out, &size, p, n)
	runtime.KeepAlive(key)
	if err := d.check("crypt_volume_key_get", r); err != nil {
		vk.Wipe()
		return secret.Bytes{}, err
	}
	return vk, nil
}

// replaceKey makes the loaded header another one, in its file: with that UUID,
// and with the volume key in keyslot 0 under key alone.
func (d *luks) replaceKey(uuid string, vk, key secret.Bytes) error {
	if err := d.check("crypt_keyslot_destroy", C.crypt_keyslot_destroy(d.cd, 0)); err != nil {
		return err
	}
	if err := d.putKey(vk, key); err != nil {
		return err
	}
	c := C.CString(uuid)
	defer C.free(unsafe.Pointer(c))
	return d.check("crypt_set_uuid", C.crypt_set_uuid(d.cd, c))
}

// putKey puts the volume key, which the loaded header has a digest of, into
// keyslot 0 under key.
func (d *luks) putKey(vk, key secret.Bytes) error {
	if err := d.check("crypt_set_pbkdf_type", C.cc_set_pbkdf(d.cd)); err != nil {
		return err
	}
	v, nv := passphrase(vk)
	p, n := passphrase(key)
	r := C.crypt_keyslot_add_by_volume_key(d.cd, 0, v, nv, p, n)
	runtime.KeepAlive(vk)
	runtime.KeepAlive(key)
	return d.check("crypt_keyslot_add_by_volume_key", r)
}

func passphrase(key secret.Bytes) (*C.char, C.size_t) {
	return (*C.char)(unsafe.Pointer(unsafe.SliceData(key.Expose()))), C.size_t(key.Len())
}

// Activation flags, see libcryptsetup.h.
const (
	flagReadOnly         = C.CRYPT_ACTIVATE_READONLY
	flagPrivate          = C.CRYPT_ACTIVATE_PRIVATE // udev rules of LVM, md, multipath stay away
	flagKeyring          = C.CRYPT_ACTIVATE_KEYRING_KEY
	flagIgnorePersistent = C.CRYPT_ACTIVATE_IGNORE_PERSISTENT
	flagDiscard          = C.CRYPT_ACTIVATE_ALLOW_DISCARDS
	flagNoJournal        = C.CRYPT_ACTIVATE_NO_JOURNAL
	flagRecovery         = C.CRYPT_ACTIVATE_RECOVERY // dm-integrity's mode R: nothing is replayed
)

// performanceFlags are the activation flags for cryptmapper.PerformanceOptions,
// in their order.
func performanceFlags() []uint32 {
	return []uint32{
		C.CRYPT_ACTIVATE_NO_READ_WORKQUEUE, C.CRYPT_ACTIVATE_NO_WRITE_WORKQUEUE,
		C.CRYPT_ACTIVATE_SAME_CPU_CRYPT, C.CRYPT_ACTIVATE_SUBMIT_FROM_CRYPT_CPUS,
	}
}

// LibraryVersion returns the version of the libcryptsetup that this process
// runs with. The library has no call for it; it says it when it initialises.
func LibraryVersion() (string, error) {
	l := newLog()
	C.crypt_set_debug_level(C.CRYPT_DEBUG_ALL)
	defer C.crypt_set_debug_level(C.CRYPT_DEBUG_NONE)
	file, err := os.CreateTemp("", "cryptcsi-version-")
	if err != nil {
		return "", err
	}
	defer func() { _ = file.Close(); _ = os.Remove(file.Name()) }()
	d, err := openLUKS(file.Name(), file.Name(), l)
	if err != nil {
		return "", err
	}
	defer d.free()
	_ = d.load() // there is no header; loading initialises the library
	if l.version == "" {
		return "", fmt.Errorf("libcryptsetup did not tell its version")
	}
	return l.version, nil
}
