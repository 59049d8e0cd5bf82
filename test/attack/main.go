// Command attack does to volumes of cryptcsi's what a hostile host can do to
// them, on a kernel with device-mapper, and prints what came of it: for each
// attack what plain cryptsetup does with the disk, what cryptcsi does, and what
// it says. It ends with exit code 1 if cryptcsi did anything else than it must.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
)

func main() {
	seed := flag.Uint64("seed", 1, "of the random changes")
	n := flag.Int("n", 300, "how many random changes are tried")
	only := flag.String("only", "", "regular expression: only rows that match")
	flag.Parse()
	pattern, err := regexp.Compile(*only)
	if err == nil {
		err = run(context.Background(), os.Stdout, *seed, *n, pattern)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "attack: %v\n", err)
		os.Exit(1)
	}
}

// suite is what all rows share.
type suite struct {
	report
	ctx     context.Context
	dir     string // for backing files
	bin     string // where our programs are
	mapper  *cryptmapper.Mapper
	mapping string // the one mapping of ours
	only    *regexp.Regexp
	seed    uint64
	n       int
	rand    *rand.Rand
	exact   bool // this is the cryptsetup whose behaviour the rows tell

	refusals []time.Duration // how long each took

	bare, sealed, other *volume // without integrity, with, and somebody else's
}

func run(ctx context.Context, w io.Writer, seed uint64, n int, only *regexp.Regexp) (err error) {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "cryptcsi-attack-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	s := &suite{
		report: report{w: w}, ctx: ctx, dir: dir, bin: filepath.Dir(self), mapping: cryptmapper.Prefix + "attacked",
		only: only, seed: seed, n: n, rand: rand.New(rand.NewPCG(seed, 0)),
	}
	s.mapper = cryptmapper.New(cryptmapper.Options{Worker: []string{filepath.Join(s.bin, "crypt-worker")}, LockDir: filepath.Join(dir, "lock")})
	defer s.mapper.Shutdown()
	version, err := output("cryptsetup", "--version")
	if err != nil {
		return err
	}
	fields := strings.Fields(version + " ? ?")
	s.exact = fields[1] == "2.6.1"
	began := time.Now()
	if err := s.prepare(); err != nil {
		return err
	}
	s.heading(fields[1])
	s.headers()
	s.disks()
	if err := s.copies(); err != nil {
		return err
	}
	if err := s.constellation(); err != nil {
		return err
	}
	s.superblocks()
	s.sectors()
	s.races()
	s.properties()
	s.plaintext()
	s.closing()
	s.memory()
	fmt.Fprintf(w, "\n%d rows in %.0f s, SEED=%d N=%d\n", s.rows, time.Since(began).Seconds(), seed, n)
	if len(s.wrong) > 0 {
		return errors.New("not as it must be:\n  " + strings.Join(s.wrong, "\n  "))
	}
	if s.rows == 0 {
		return errors.New("no row matches")
	}
	return nil
}

// prepare makes the volumes that the rows attack copies of.
func (s *suite) prepare() error {
	var err error
	if s.bare, err = s.make("bare", "attack.cryptcsi.io/bare", 24*mib, ""); err != nil {
		return fmt.Errorf("a volume without integrity: %w", err)
	}
	if s.sealed, err = s.make("sealed", "attack.cryptcsi.io/sealed", 24*mib, "hmac-sha256"); err != nil {
		return fmt.Errorf("a volume with integrity: %w", err)
	}
	if s.other, err = s.make("other", "attack.cryptcsi.io/other", 24*mib, ""); err != nil {
		return fmt.Errorf("another volume: %w", err)
	}
	return nil
}
