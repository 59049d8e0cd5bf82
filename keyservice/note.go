package keyservice

import (
	"context"
	"errors"
	"fmt"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// read is GetDEK that refuses a record which was rolled back. The note is read
// first: a record that is read later is never behind it by rights.
func (s *Server) read(ctx context.Context, keys NodeKeys, id dek.ID) (dek.DEK, error) {
	note, noted, err := s.note(ctx, id)
	if err != nil {
		return dek.DEK{}, err
	}
	return readAtLeast(ctx, keys, id, note, noted)
}

// current refuses a record that was rolled back; nil also where nothing is
// noted, whether there is a record or not.
func (s *Server) current(ctx context.Context, keys NodeKeys, id dek.ID) error {
	note, noted, err := s.note(ctx, id)
	if err != nil || !noted {
		return err
	}
	d, err := readAtLeast(ctx, keys, id, note, noted)
	d.Wipe()
	return err
}

func (s *Server) note(ctx context.Context, id dek.ID) (dek.HeaderID, bool, error) {
	if s.cfg.Notes == nil {
		return dek.HeaderID{}, false, nil
	}
	note, noted, err := s.cfg.Notes.Note(ctx, id)
	if err != nil {
		return dek.HeaderID{}, false, again(ctx, fmt.Errorf("what is noted about DEK %s cannot be read: %w", id, err))
	}
	return note, noted, nil
}

func readAtLeast(ctx context.Context, keys NodeKeys, id dek.ID, note dek.HeaderID, noted bool) (dek.DEK, error) {
	d, err := keys.GetDEK(ctx, id)
	if !noted {
		return d, err
	}
	if errors.Is(err, errdefs.ErrNotFound) {
		// %v: to the caller this is no ErrNotFound.
		return dek.DEK{}, rolledBack(id, fmt.Sprintf("it is missing (%v)", err))
	}
	if err != nil {
		return dek.DEK{}, err
	}
	behind := ""
	switch {
	case d.State == dek.Prepared:
		behind = "it is " + string(d.State)
	case d.Header.UUID != note.UUID:
		behind = "it knows another header, " + d.Header.UUID
	case d.Header.Sequence < note.Sequence:
		behind = fmt.Sprintf("its header's sequence is %d, and %d was confirmed", d.Header.Sequence, note.Sequence)
	}
	if behind != "" {
		d.Wipe()
		return dek.DEK{}, rolledBack(id, behind)
	}
	return d, nil
}

func rolledBack(id dek.ID, how string) error {
	return errdefs.Errorf(errdefs.ErrState, "the record of DEK %s was rolled back: the volume is noted as formatted, but %s; an operator has to restore the store's newer state", id, how)
}

// noteDown writes the note; until it is there the caller has to come again.
func (s *Server) noteDown(ctx context.Context, id dek.ID, h dek.HeaderID) error {
	if s.cfg.Notes == nil {
		return nil
	}
	h.Fingerprint = "" // says something only about this request
	if err := s.cfg.Notes.Confirm(ctx, id, h); err != nil {
		return again(ctx, fmt.Errorf("the record of DEK %s is confirmed, the note beside it is not yet: %w", id, err))
	}
	return nil
}

// again makes an error one that the caller retries, except that its own end
// stays what it is.
func again(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
}
