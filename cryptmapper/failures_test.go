package cryptmapper

import "testing"

// Records as kernels return them from /dev/kmsg.
func TestParseRecord(t *testing.T) {
	for record, want := range map[string]int{
		"3,121,16270000,-;trusted_key: device-mapper: crypt: dm-0: INTEGRITY AEAD ERROR, sector 64224\n":                    0,
		"3,812,52861210,-;device-mapper: crypt: dm-3: INTEGRITY AEAD ERROR, sector 16\n":                                    3,
		"3,812,52861210,-;device-mapper: crypt: dm-12: INTEGRITY AEAD ERROR, sector 0\n SUBSYSTEM=block\n DEVICE=b253:12\n": 12,
		"11,812,52861210,-;device-mapper: crypt: dm-3: INTEGRITY AEAD ERROR, sector 16\n":                                   -1, // a process wrote it
		"6,1,0,-;device-mapper: crypt: xts(aes) using implementation xts-aes-aesni\n":                                       -1,
		"3,9,1,-;Buffer I/O error on dev dm-3, logical block 2, device-mapper: crypt: dm-3: INTEGRITY AEAD ERROR\n":         -1,
		"3,9,1,-;device-mapper: crypt: dm-99999999999: INTEGRITY AEAD ERROR, sector 16\n":                                   -1,
		"device-mapper: crypt: dm-3: INTEGRITY AEAD ERROR, sector 16\n":                                                     -1,
		"": -1,
	} {
		got := -1
		if minor, ok := parseRecord([]byte(record)); ok {
			got = int(minor)
		}
		if got != want {
			t.Errorf("%q: %d, want %d", record, got, want)
		}
	}
}
