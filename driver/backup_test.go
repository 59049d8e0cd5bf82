package driver_test

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
)

// keeping is a mapper that makes header backups, as the real one is told to.
type keeping struct{ driver.Mapper }

const aBackup = "YSBoZWFkZXI="

func (k keeping) with(m driver.Mapping, err error, d dek.DEK) (driver.Mapping, error) {
	if m.Made && (d.Header.Backup == "" || m.Header.Sequence > d.Header.Sequence) {
		m.Header.Backup = aBackup
	}
	return m, err
}

func (k keeping) Open(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	m, err := k.Mapper.Open(ctx, v, d)
	return k.with(m, err, d)
}

func (k keeping) MarkMade(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	m, err := k.Mapper.MarkMade(ctx, v, d)
	return k.with(m, err, d)
}

func (k keeping) Resize(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	m, err := k.Mapper.Resize(ctx, v, d)
	return k.with(m, err, d)
}

// A header backup reaches the record, of a new volume and of one that had none,
// once; and it stays in the record alone.
func TestHeaderBackupIsConfirmed(t *testing.T) {
	for name, old := range map[string]bool{"new volume": false, "old volume": true} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t).start()
			if old {
				m.ok("stage", m.stage(mountCap("ext4")))
				m.ok("unstage", m.unstage())
			}
			m.mapper = func(real driver.Mapper) driver.Mapper { return keeping{real} }
			m.start()
			m.ok("stage", m.stage(mountCap("ext4")))
			if r := m.record(); r.Header.Backup != aBackup || r.State != dek.Formatted {
				t.Errorf("the record is %+v", r)
			}
			m.onlyInTheRecord()
			m.ok("unstage", m.unstage())
			confirmed := m.count("ConfirmDEK")
			m.ok("stage again", m.stage(mountCap("ext4")))
			if n := m.count("ConfirmDEK"); n != confirmed {
				t.Errorf("confirmed %d times more", n-confirmed)
			}
			m.wrapped.Grow(volumeID, 96*mib)
			_, err := m.expand(m.staging(), 96*mib)
			m.ok("expand", err)
			m.onlyInTheRecord()
			m.ok("unstage", m.unstage())
		})
	}
}

func (m *machine) onlyInTheRecord() {
	m.t.Helper()
	err := filepath.WalkDir(filepath.Join(m.dir, "kubelet"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if strings.Contains(string(b), aBackup) {
			m.t.Errorf("%s has the backup", path)
		}
		return err
	})
	if err != nil {
		m.t.Error(err)
	}
}
