package main

import (
	"bytes"
	"encoding/binary"
	"maps"
	"math/rand/v2"
	"strings"
	"testing"
)

// cached is a disk with a cache that loses any part of it when power goes.
type cached struct{ platter, cache map[int][]byte }

func (c *cached) flush() {
	maps.Copy(c.platter, c.cache)
	clear(c.cache)
}

func (c *cached) cut(rng *rand.Rand) {
	for i, b := range c.cache {
		if rng.IntN(2) == 0 {
			c.platter[i] = b
		}
	}
}

// A disk that keeps what it flushed is right by the model, however much of the
// rest it keeps; one that does not do its last flush is wrong.
func TestModel(t *testing.T) {
	const sectors = 40
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 0))
		m := newModel(seed, sectors)
		c := cached{map[int][]byte{}, map[int][]byte{}}
		write := func(i int) {
			buf := m.begin(i, 1, make([]byte, sectorSize))
			c.cache[i] = bytes.Clone(buf)
			m.end(i, 1, true)
		}
		flush := func(broken bool) {
			covered := m.beginFlush()
			if !broken {
				c.flush()
			}
			m.endFlush(covered)
		}
		for range rng.IntN(60) {
			if write(rng.IntN(sectors)); rng.IntN(8) == 0 {
				flush(false)
			}
		}
		broken := seed%2 == 1
		for i := range sectors { // enough that losing half cannot go unseen
			write(i)
		}
		flush(broken)
		for range rng.IntN(5) {
			write(rng.IntN(sectors))
		}
		c.cut(rng)
		var wrong error
		for i, allowed := range m.after(len(m.flushes)) {
			b, ok := c.platter[i]
			if !ok {
				b = make([]byte, sectorSize)
			}
			if _, err := m.check(b, i, allowed); err != nil {
				wrong = err
			}
		}
		if (wrong != nil) != broken {
			t.Fatalf("seed %d, last flush done: %v: %v", seed, !broken, wrong)
		}
	}
}

// What was written nowhere, elsewhere, or by another is garbage.
func TestModelGarbage(t *testing.T) {
	m := newModel(1, 2)
	good := bytes.Clone(m.begin(0, 1, make([]byte, sectorSize)))
	m.end(0, 1, true)
	torn := append(bytes.Clone(good[:512]), make([]byte, sectorSize-512)...)
	for name, b := range map[string][]byte{"moved": good, "torn": torn, "noise": bytes.Repeat([]byte{7}, sectorSize)} {
		if _, err := m.check(b, 1, []uint32{0, 1}); err == nil || !strings.Contains(err.Error(), "garbage") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := m.check(good, 0, []uint32{1}); err != nil {
		t.Error(err)
	}
}

func TestReadLogRefuses(t *testing.T) {
	super := func(magic, entries uint64, sector uint32) []byte {
		var b bytes.Buffer
		_ = binary.Write(&b, binary.LittleEndian, []uint64{magic, logVersion, entries})
		_ = binary.Write(&b, binary.LittleEndian, sector)
		return append(b.Bytes(), make([]byte, 512-28)...)
	}
	for name, log := range map[string][]byte{
		"empty": nil, "not a log": super(1, 0, 512), "no sectors": super(logMagic, 0, 0), "cut short": super(logMagic, 1, 512),
	} {
		if entries, err := readLog(bytes.NewReader(log)); err == nil {
			t.Errorf("%s: %d entries", name, len(entries))
		}
	}
	if _, err := readLog(bytes.NewReader(super(logMagic, 0, 512))); err != nil {
		t.Error(err)
	}
}
