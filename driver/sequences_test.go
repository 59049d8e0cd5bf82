package driver_test

import (
	"fmt"
	"hash/fnv"
	"maps"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// The calls that an orchestrator makes, and what happens to machines meanwhile.
const (
	opCreate         = "CreateVolume"
	opRestore        = "CreateVolume of a snapshot"
	opClone          = "CreateVolume of a volume"
	opCreateAgain    = "CreateVolume again"
	opDelete         = "DeleteVolume"
	opSnapshot       = "CreateSnapshot"
	opSnapshotAgain  = "CreateSnapshot again"
	opDeleteSnapshot = "DeleteSnapshot"
	opAttach         = "ControllerPublish"
	opDetach         = "ControllerUnpublish"
	opStage          = "NodeStage"
	opUnstage        = "NodeUnstage"
	opPublish        = "NodePublish"
	opUnpublish      = "NodeUnpublish"
	opWrite          = "write"
	opRead           = "read"
	opExpand         = "ControllerExpand"
	opNodeExpand     = "NodeExpand"
	opKill           = "kill node plugin"
	opKillController = "kill controller"
	opReboot         = "reboot node"
	opSick           = "NodeStage of zeros"
	opReplug         = "disk comes back as another"
)

// weights say how often each is tried.
func weights() map[string]int {
	return map[string]int{
		opCreate: 5, opRestore: 10, opClone: 5, opCreateAgain: 8, opDelete: 4,
		opSnapshot: 8, opSnapshotAgain: 8, opDeleteSnapshot: 2,
		opAttach: 12, opDetach: 8, opStage: 18, opUnstage: 8, opPublish: 14, opUnpublish: 10,
		opWrite: 14, opRead: 6, opExpand: 5, opNodeExpand: 6, opKill: 1, opKillController: 1, opReboot: 2, opSick: 8, opReplug: 6,
	}
}

// op is one step of a sequence. It names slots, not things, so that a sequence
// still means something when earlier steps are left out.
type op struct {
	Kind                           string
	Volume, Snapshot, Source       int // slots
	Node, Pod                      int
	Shape                          int
	Larger                         bool // a copy: than its source
	Again                          bool // the same call once more after it succeeded
	FaultAt                        int  // which step inside goes wrong, from 1; 0: none
	FaultAfter, FaultFinal, Killed bool // how
	repeated                       bool // this is that second call
}

func (o op) String() string {
	s := fmt.Sprintf("%-26s volume %d node %d", o.Kind, o.Volume, o.Node)
	switch o.Kind {
	case opSick:
		s += map[bool]string{true: " behind a header"}[!o.Again]
	case opPublish, opUnpublish, opWrite, opRead:
		s += fmt.Sprintf(" pod %d", o.Pod)
	case opCreate:
		s += fmt.Sprintf(" %+v", shapes()[o.Shape])
	case opReplug:
		s += fmt.Sprintf(", its number to volume %d", o.Source)
	case opClone:
		s += fmt.Sprintf(" of volume %d", o.Source)
	case opSnapshot, opSnapshotAgain, opRestore, opDeleteSnapshot:
		s += fmt.Sprintf(" snapshot %d", o.Snapshot)
	}
	if o.Larger {
		s += " larger"
	}
	if o.Again {
		s += " twice"
	}
	if o.FaultAt > 0 {
		how := "fails for now"
		if o.Killed {
			how = "dies"
		} else if o.FaultFinal {
			how = "fails for good"
		}
		s += fmt.Sprintf("; %s %s step %d", how, map[bool]string{false: "before", true: "after"}[o.FaultAfter], o.FaultAt)
	}
	return s
}

// randomOp is any op at all; whether it is legal is the model's matter.
func randomOp(r *rand.Rand, kinds []string) op {
	o := op{
		Kind: kinds[r.IntN(len(kinds))], Volume: r.IntN(volumeSlots), Snapshot: r.IntN(snapshotSlots), Source: r.IntN(volumeSlots),
		Node: r.IntN(sequenceNodes), Pod: r.IntN(sequencePods), Shape: r.IntN(len(shapes())), Larger: r.IntN(3) == 0, Again: r.IntN(6) == 0,
	}
	if r.IntN(3) == 0 {
		o.FaultAt = 1 + r.IntN([]int{3, 10, 40}[r.IntN(3)])
		o.FaultAfter, o.FaultFinal, o.Killed = r.IntN(2) == 0, r.IntN(2) == 0, r.IntN(2) == 0
	}
	return o
}

// tally is what a run has done.
type tally struct {
	ops                     map[string]int
	faults, deaths, volumes int
	digest                  uint64 // of every step and what came of it
}

func (t *tally) add(other tally) {
	if t.ops == nil {
		t.ops = map[string]int{}
	}
	for kind, n := range other.ops {
		t.ops[kind] += n
	}
	t.faults += other.faults
	t.deaths += other.deaths
	t.volumes += other.volumes
	t.digest ^= other.digest
}

// variants are the wrapped drivers and settings that sequences run with.
type variant struct {
	name string
	set  func(*world)
}

func variants() []variant {
	return []variant{
		{"plain", func(*world) {}},
		{"handed over", func(w *world) { w.handOver = true }},
		{"no stage", func(w *world) { w.noStage = true }},
		{"stacking, forgetting", func(w *world) { w.stacks = true }},
	}
}

const sequenceLength = 60

// sequence makes up a sequence while it runs, and returns it.
func sequence(dir string, seed, index uint64, bug *bug) (ops []op, t tally, err error) {
	r := rand.New(rand.NewPCG(seed, index))
	w, err := newWorld(dir, int(index)%len(variants()), bug)
	if err != nil {
		return nil, tally{}, err
	}
	defer w.close()
	var kinds []string
	for _, kind := range slices.Sorted(maps.Keys(weights())) {
		kinds = append(kinds, slices.Repeat([]string{kind}, weights()[kind])...)
	}
	length := 1 + r.IntN(sequenceLength)
	for tries := 0; len(ops) < length && tries < 100*length; tries++ {
		o := randomOp(r, kinds)
		if !w.model.legal(o) {
			continue
		}
		ops = append(ops, o)
		if err := w.do(o); err != nil {
			return ops, w.tally, err
		}
	}
	return ops, w.tally, w.settle()
}

// replay runs a sequence, without the steps that are not legal any more.
func replay(dir string, index uint64, bug *bug, ops []op) error {
	w, err := newWorld(dir, int(index)%len(variants()), bug)
	if err != nil {
		return err
	}
	defer w.close()
	for _, o := range ops {
		if !w.model.legal(o) {
			continue
		}
		if err := w.do(o); err != nil {
			return err
		}
	}
	return w.settle()
}

// shrink leaves out steps and faults as long as it still fails.
func shrink(ops []op, fails func([]op) error) ([]op, error) {
	err := fails(ops)
	if err == nil {
		return ops, nil
	}
	for size := max(1, len(ops)/2); size > 0; {
		smaller := false
		for at := 0; at+size <= len(ops); {
			if fewer := slices.Delete(slices.Clone(ops), at, at+size); fails(fewer) != nil {
				ops, smaller = fewer, true
				continue
			}
			at += size
		}
		if !smaller || size > len(ops) {
			size /= 2
		}
	}
	for i := range ops {
		for _, simpler := range []func(*op){
			func(o *op) { o.FaultAt = 0 }, func(o *op) { o.Again = false }, func(o *op) { o.Larger = false }, func(o *op) { o.Shape = 0 },
		} {
			changed := slices.Clone(ops)
			simpler(&changed[i])
			if changed[i] != ops[i] && fails(changed) != nil {
				ops = changed
			}
		}
	}
	return ops, fails(ops)
}

// failure is a sequence that broke a promise.
type failure struct {
	index uint64
	ops   []op
	err   error
}

// runSequences runs n sequences, first to last, and stops at the first failure.
func runSequences(dir string, seed, first, n uint64, bug *bug) (tally, *failure) {
	var (
		mu    sync.Mutex
		total tally
		worst *failure
		next  atomic.Uint64
		wg    sync.WaitGroup
	)
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for {
				index := first + next.Add(1) - 1
				mu.Lock()
				over := index >= first+n || worst != nil
				mu.Unlock()
				if over {
					return
				}
				ops, t, err := sequence(dir, seed, index, bug)
				mu.Lock()
				total.add(t)
				if err != nil && (worst == nil || index < worst.index) {
					worst = &failure{index, ops, err}
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return total, worst
}

// tell is how a failure is printed.
func (f *failure) tell(dir string, seed uint64, bug *bug) string {
	ops, err := shrink(f.ops, func(ops []op) error { return replay(dir, f.index, bug, ops) })
	if err == nil {
		ops, err = f.ops, fmt.Errorf("%w (does not happen again)", f.err)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "sequence %d (%s), found as: %v\nshortened from %d steps to %d:\n", f.index, variants()[int(f.index)%len(variants())].name, f.err, len(f.ops), len(ops))
	for i, o := range ops {
		fmt.Fprintf(&b, "  %2d %s\n", i+1, o)
	}
	fmt.Fprintf(&b, "and then: %v\nagain: make sequences SEED=%d FIRST=%d N=1", err, seed, f.index)
	return b.String()
}

// number reads a setting from the environment.
func number(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	text := os.Getenv("SEQUENCES_" + name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s=%q: %v", name, text, err)
	}
	return n
}

// TestSequences makes whatever calls an orchestrator may make, with retries and
// deaths, and checks what users were promised: data are there, under the
// volume's own key, behind the mapping; what is deleted is gone; nothing is left.
func TestSequences(t *testing.T) {
	t.Parallel()
	seed, first, n := number(t, "SEED", 1), number(t, "FIRST", 0), number(t, "N", 60)
	dir, began := scratch(t), time.Now()
	total, failed := runSequences(dir, seed, first, n, nil)
	if failed != nil {
		t.Fatal(failed.tell(dir, seed, nil))
	}
	steps := 0
	for _, kind := range slices.Sorted(maps.Keys(total.ops)) {
		t.Logf("%9d %s", total.ops[kind], kind)
		steps += total.ops[kind]
	}
	t.Logf("%d sequences (seed %d, %s) of %d steps, %d volumes; %d steps went wrong, %d processes died in them: no violation, in %v",
		n, seed, fmt.Sprintf("digest %016x", total.digest), steps, total.volumes, total.faults, total.deaths, time.Since(began).Round(time.Millisecond))
}

// digest adds a line to the digest.
func (t *tally) note(line string) {
	h := fnv.New64a()
	fmt.Fprintf(h, "%016x %s", t.digest, line)
	t.digest = h.Sum64()
}
