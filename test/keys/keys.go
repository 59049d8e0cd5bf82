// Package keys proves that every KEK works with every store: what is here is
// tests, see `make test-keys`.
package keys
