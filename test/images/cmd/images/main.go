// Command images makes the images csi-plugin and key-service for several
// architectures, each as a folder in the OCI layout, and a kustomize component that
// names them by digest. See package images.
package main

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/cryptcsi/cryptcsi/test/images"
)

func main() {
	packages := flag.String("packages", ".cache/images", "folder with Debian's packages, one folder for each architecture")
	programs := flag.String("programs", "bin/images", "folder with our programs, one folder for each architecture")
	out := flag.String("out", "bin/images", "folder for the images")
	arches := flag.String("arch", "amd64,arm64", "architectures")
	registry := flag.String("registry", "", "registry that the images will be in, for kustomization.yaml")
	version := flag.String("version", "dev", "label org.opencontainers.image.version")
	commit := flag.String("commit", "unknown", "label org.opencontainers.image.revision")
	at := flag.Int64("time", 0, "when all files are from, in seconds since 1970")
	flag.Parse()
	b := images.Builder{Packages: *packages, Programs: *programs, Out: *out, Arches: strings.Split(*arches, ","), At: time.Unix(*at, 0).UTC()}
	labels := map[string]string{
		"org.opencontainers.image.source": "https://github.com/cryptcsi/cryptcsi", "org.opencontainers.image.licenses": "Apache-2.0",
		"org.opencontainers.image.version": *version, "org.opencontainers.image.revision": *commit,
	}
	if err := b.All(images.Releases(labels), *registry); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}
