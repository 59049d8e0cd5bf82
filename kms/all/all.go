// Package all is the list of the KMS schemes that the binaries know.
package all

import (
	"maps"
	"slices"

	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/awskms"
	"github.com/cryptcsi/cryptcsi/kms/azurekeyvault"
	"github.com/cryptcsi/cryptcsi/kms/cluster"
	"github.com/cryptcsi/cryptcsi/kms/gcpckms"
	"github.com/cryptcsi/cryptcsi/kms/kmip"
	"github.com/cryptcsi/cryptcsi/kms/pkcs11"
	"github.com/cryptcsi/cryptcsi/kms/static"
	"github.com/cryptcsi/cryptcsi/kms/transit"
)

// Usable returns the schemes of which this build can open a KEK, sorted.
func Usable() []string {
	schemes := Mux()
	if !pkcs11.Built {
		delete(schemes, pkcs11.Scheme)
	}
	return slices.Sorted(maps.Keys(schemes))
}

// Mux returns the list. Every call gives a map of its own.
func Mux() kms.Mux {
	return kms.Mux{
		awskms.Scheme:        awskms.Open,
		azurekeyvault.Scheme: azurekeyvault.Open,
		cluster.Scheme:       cluster.Open,
		gcpckms.Scheme:       gcpckms.Open,
		kmip.Scheme:          kmip.Open,
		pkcs11.Scheme:        pkcs11.NewOpener().Open,
		static.Scheme:        static.Open,
		transit.Scheme:       transit.Open,
	}
}
