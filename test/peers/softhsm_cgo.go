//go:build cgo

package peers

import "github.com/miekg/pkcs11"

// finalize makes the next use of a PKCS#11 module begin anew.
func finalize(module string) {
	if m := pkcs11.New(module); m != nil { // for good: unloading could hit who uses it
		_ = m.Finalize() // fails where nobody has used it
	}
}
