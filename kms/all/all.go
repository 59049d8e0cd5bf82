// Package all is the list of the KMS schemes that the binaries know.
package all

import (
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/cluster"
)

// Mux returns the list. Every call gives a map of its own.
func Mux() kms.Mux {
	return kms.Mux{
		cluster.Scheme: cluster.Open,
	}
}
