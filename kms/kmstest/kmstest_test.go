package kmstest_test

import (
	"testing"

	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
)

func TestFake(t *testing.T) {
	service := kmstest.NewBackend()
	kmstest.Run(t, kmstest.Harness{
		Open:      func(*testing.T) *kms.KEK { return kms.New("fake", service, kms.Options{}) },
		OpenOther: func(*testing.T) *kms.KEK { return kms.New("fake", kmstest.NewBackend(), kms.Options{}) },
		Rotate: func(*testing.T) *kms.KEK {
			service.Rotate()
			return kms.New("fake", service, kms.Options{})
		},
	})
}
