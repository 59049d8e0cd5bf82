package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
)

// sectorSize is what is written and lost as one: the sector of dm-integrity.
const sectorSize = 4096

// A model remembers every write, and says what each sector may hold after a
// power cut: what the last acknowledged flush covered, or anything written
// after that. A version is the number of a write, 0 the zeros of a sector that
// was never written. It is safe for concurrent use.
type model struct {
	mu      sync.Mutex
	seed    uint64
	next    uint32
	written [][]uint32       // by sector: what it held when the session began, then every write
	acked   []uint32         // by sector: the last acknowledged write
	busy    []bool           // by sector: a write is on its way
	flushes []map[int]uint32 // by flush, in order: the sectors that it made durable
}

func newModel(seed uint64, sectors int) *model {
	m := &model{seed: seed, written: make([][]uint32, sectors), acked: make([]uint32, sectors), busy: make([]bool, sectors)}
	for i := range m.written {
		m.written[i] = []uint32{0}
	}
	return m
}

// begin takes sectors for one writer and returns what to write there, nil where
// another write to one of them is on its way.
func (m *model) begin(first, n int, buf []byte) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	if slices.Contains(m.busy[first:first+n], true) {
		return nil
	}
	for i := first; i < first+n; i++ {
		m.next++
		m.busy[i] = true
		m.written[i] = append(m.written[i], m.next)
		m.fill(buf[(i-first)*sectorSize:][:sectorSize], i, m.next)
	}
	return buf[:n*sectorSize]
}

// end tells that a write was acknowledged, or was not.
func (m *model) end(first, n int, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := first; i < first+n; i++ {
		m.busy[i] = false
		if ok {
			m.acked[i] = m.written[i][len(m.written[i])-1]
		}
	}
}

// hold takes a sector for one reader; false where a write is on its way.
func (m *model) hold(sector int) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	free := !m.busy[sector]
	m.busy[sector] = true
	return free
}

func (m *model) release(sector int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.busy[sector] = false
}

// held returns what a sector that is held must read as.
func (m *model) held(sector int) []uint32 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return []uint32{m.acked[sector]}
}

// beginFlush returns what a flush that is sent now will make durable.
func (m *model) beginFlush() []uint32 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.acked)
}

// endFlush tells that the flush was acknowledged and returns its number.
func (m *model) endFlush(covered []uint32) int {
	durable := map[int]uint32{}
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, version := range covered {
		if version != m.written[i][0] {
			durable[i] = version
		}
	}
	m.flushes = append(m.flushes, durable)
	return len(m.flushes) - 1
}

// endFUA tells that a write was acknowledged that is durable at once, and
// returns the number of the flush that it counts as.
func (m *model) endFUA(first, n int) int {
	durable := map[int]uint32{}
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := first; i < first+n; i++ {
		m.busy[i] = false
		m.acked[i] = m.written[i][len(m.written[i])-1]
		durable[i] = m.acked[i]
	}
	m.flushes = append(m.flushes, durable)
	return len(m.flushes) - 1
}

// after returns what each sector may hold when the power went off after that
// many flushes.
func (m *model) after(flushes int) [][]uint32 {
	m.mu.Lock()
	defer m.mu.Unlock()
	durable := map[int]uint32{}
	for _, flush := range m.flushes[:flushes] {
		for i, version := range flush {
			durable[i] = max(durable[i], version)
		}
	}
	allowed := slices.Clone(m.written)
	for i, version := range durable {
		allowed[i] = m.written[i][slices.Index(m.written[i], version):]
	}
	return allowed
}

// now returns what each sector holds while nothing was lost.
func (m *model) now() [][]uint32 {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := make([][]uint32, len(m.acked))
	for i, version := range m.acked {
		now[i] = []uint32{version}
	}
	return now
}

// restart begins a session with what was found on the disk.
func (m *model) restart(found []uint32) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, version := range found {
		m.written[i], m.acked[i], m.busy[i] = []uint32{version}, version, false
	}
	m.flushes = nil
}

// fill writes the content of a version: who wrote it where, and then noise from
// that, so that no part can be taken for that of another.
func (m *model) fill(b []byte, sector int, version uint32) {
	binary.LittleEndian.PutUint64(b, m.seed)
	binary.LittleEndian.PutUint64(b[8:], uint64(sector))
	binary.LittleEndian.PutUint64(b[16:], uint64(version))
	x := m.seed ^ uint64(sector)<<32 ^ uint64(version)
	for i := 24; i < sectorSize; i += 8 { // splitmix64
		x += 0x9e3779b97f4a7c15
		z := (x ^ x>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		binary.LittleEndian.PutUint64(b[i:], z^z>>31)
	}
}

// version tells which version a sector's content is; an error if none.
func (m *model) version(b []byte, sector int) (uint32, error) {
	if bytes.Equal(b, make([]byte, sectorSize)) {
		return 0, nil
	}
	version := uint32(binary.LittleEndian.Uint64(b[16:]))
	want := make([]byte, sectorSize)
	if m.fill(want, sector, version); version == 0 || !bytes.Equal(b, want) {
		return 0, fmt.Errorf("garbage, beginning with %x", b[:24])
	}
	return version, nil
}

// check compares the content of a sector with what is allowed.
func (m *model) check(b []byte, sector int, allowed []uint32) (uint32, error) {
	version, err := m.version(b, sector)
	if err != nil {
		return 0, fmt.Errorf("sector %d: %w", sector, err)
	}
	if !slices.Contains(allowed, version) {
		return 0, fmt.Errorf("sector %d: holds write %d, and may hold only %v", sector, version, allowed)
	}
	return version, nil
}
