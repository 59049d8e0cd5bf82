// Package stores is the list of the stores that the binaries know, one file
// for each that needs a service.
package stores

import "github.com/cryptcsi/cryptcsi/envelope"

// Mux returns the list. Every call gives a map of its own.
func Mux() envelope.StoreMux {
	m := envelope.LocalStores()
	m["k8s"] = openK8s
	m["s3"] = openS3
	m["gs"] = openGS
	m["azblob"] = openAzblob
	return m
}
