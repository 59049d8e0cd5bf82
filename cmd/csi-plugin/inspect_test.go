package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/driver"
)

// What cannot be read is the error of a table that shows all the rest.
func TestInspectShowsWhatItCan(t *testing.T) {
	damaged := errors.New("state file x is damaged")
	var out bytes.Buffer
	err := printMappings(&out, []driver.MappingInfo{
		{State: driver.StateUnreadable, Problem: damaged},
		{State: driver.StateClosed, VolumeID: "vol-1"},
	}, func(driver.MappingInfo) string { return "" })
	if !errors.Is(err, damaged) {
		t.Errorf("the error is %v", err)
	}
	if text := out.String(); !strings.Contains(text, "vol-1") || !strings.Contains(text, string(driver.StateUnreadable)) {
		t.Errorf("the table is\n%s", text)
	}
	if err := printMappings(&out, nil, nil); err != nil {
		t.Errorf("nothing to show: %v", err)
	}
}
