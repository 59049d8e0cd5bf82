package stores

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"gocloud.dev/blob"

	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
)

// bucketStore is a Store in a bucket (a container, for Azure): the object NAME
// lies under the key PREFIX + NAME. Reading and listing are the same for every
// service; what is not is its service.
//
// gocloud.dev's own codes of errors are never looked at: they take some
// refusals, and hosts that do not resolve, for objects that do not exist.
type bucketStore struct {
	service
	bucket *blob.Bucket
	prefix string
	// where the bucket is, for messages: "bucket NAME".
	where string
	// needs is what Permissions returns.
	needs map[string]string
	// deniedRead is what else may be behind a Read that is refused.
	deniedRead string
}

// service is what each service does in its own way. Errors are the client's
// own; fault tells what they mean. Keys include the prefix.
type service interface {
	// put writes an object in one request that is not sent twice: a new one
	// where version is "", else in the place of that version.
	put(ctx context.Context, key string, data []byte, version string) error
	// remove deletes the object of that version.
	remove(ctx context.Context, key, version string) error
	// version of an object, given what reading it answered.
	version(r *blob.Reader) string
	// isVersion says whether version can have answered v.
	isVersion(v string) bool
	// erase is envelope.Eraser's method.
	erase(ctx context.Context, key string) (time.Time, error)
	// create is envelope.Maker's method.
	create(ctx context.Context) error
	// fault says what an error of the client means; it may have to ask.
	fault(ctx context.Context, err error) (verdict, string)
	// idle closes connections that are not in use.
	idle()
}

// verdict is what went wrong.
type verdict int

const (
	unanswered    verdict = iota // it may or may not have happened
	noObject                     // the object does not exist, the bucket does
	noBucket                     //
	conditionFail                // the object is not in the state that was asked for: no change
	busy                         // others change the object right now: no change
	denied                       // a permission is missing
	refused                      // for another reason, which the words say
	impossible                   // what was asked for can never work
	odd                          // a person must look
	taken                        // the bucket's name is someone else's
)

const (
	// busyTries is how often a write is tried that meets another one.
	busyTries = 8
	busyPause = 50 * time.Millisecond
	// contentType of every object.
	contentType = "application/json"
	// maxAnswer bounds what a service may answer at once, in bytes.
	maxAnswer = 8 << 20
	// maxPage is the most names asked for at once.
	maxPage = 1000
	// maxSaid bounds what is quoted of a service's message, in bytes.
	maxSaid = 400
)

func (s *bucketStore) Create(ctx context.Context, name string, data []byte) error {
	if err := checkWrite(ctx, name, data); err != nil {
		return err
	}
	var err error
	for try := range busyTries {
		if err = guarded(func() error { return s.put(ctx, s.prefix+name, data, "") }); err == nil {
			return nil
		}
		// Whoever else creates it may still fail, so it is not there yet.
		if v, _ := s.faultOf(ctx, err); v != busy || try+1 == busyTries || !pause(ctx, rand.N(busyPause)) {
			break
		}
	}
	return s.fail(ctx, envelope.OpCreate, err)
}

func (s *bucketStore) Read(ctx context.Context, name string) ([]byte, string, error) {
	if err := checkWrite(ctx, name, nil); err != nil {
		return nil, "", err
	}
	var r *blob.Reader
	err := guarded(func() (err error) {
		r, err = s.bucket.NewReader(ctx, s.prefix+name, nil)
		return err
	})
	if err != nil {
		return nil, "", s.fail(ctx, envelope.OpRead, err)
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, envelope.MaxObject+1))
	version := s.version(r)
	switch {
	case err != nil:
		return nil, "", s.fail(ctx, envelope.OpRead, err)
	case len(data) > envelope.MaxObject:
		return nil, "", errdefs.Errorf(errdefs.ErrCorrupt, "the object %s in %s is longer than %d bytes: it is no record", s.prefix+name, s.where, envelope.MaxObject)
	case int64(len(data)) != r.Size():
		return nil, "", errdefs.Errorf(errdefs.ErrUnavailable, "%s: only a part of the object came", s.where)
	case version == "":
		return nil, "", errdefs.Errorf(errdefs.ErrState, "%s: the service gives objects no versions, so they cannot be changed safely: use another store", s.where)
	}
	return data, version, nil
}

func (s *bucketStore) Replace(ctx context.Context, name string, data []byte, version string) error {
	if err := checkWrite(ctx, name, data); err != nil {
		return err
	}
	if !s.isVersion(version) {
		return errChanged()
	}
	return s.fail(ctx, envelope.OpReplace, guarded(func() error { return s.put(ctx, s.prefix+name, data, version) }))
}

func (s *bucketStore) Delete(ctx context.Context, name, version string) error {
	if err := checkWrite(ctx, name, nil); err != nil {
		return err
	}
	if !s.isVersion(version) {
		return errChanged()
	}
	return s.fail(ctx, envelope.OpDelete, guarded(func() error { return s.remove(ctx, s.prefix+name, version) }))
}

// List asks on until a page is full: what lies in subfolders, and names that are
// not ours, count for the service and not for us.
func (s *bucketStore) List(ctx context.Context, token string, limit int) (names []string, next string, err error) {
	if err := ctx.Err(); err != nil {
		return nil, "", err
	}
	page := blob.FirstPageToken
	if token != "" {
		page = []byte(token)
	}
	limit = min(max(limit, 1), maxPage)
	for len(names) < limit {
		var objects []*blob.ListObject
		var after []byte
		err := guarded(func() (err error) {
			objects, after, err = s.bucket.ListPage(ctx, page, limit-len(names), &blob.ListOptions{Prefix: s.prefix, Delimiter: "/"})
			return err
		})
		if err != nil {
			return nil, "", s.fail(ctx, envelope.OpList, err)
		}
		for _, o := range objects {
			if name, ok := strings.CutPrefix(o.Key, s.prefix); ok && !o.IsDir && checkName(name) == nil {
				names = append(names, name)
			}
		}
		if len(after) == 0 {
			return names, "", nil
		}
		page = after
	}
	return names, string(page), nil
}

// EraseHistory is part of envelope.Eraser.
func (s *bucketStore) EraseHistory(ctx context.Context, name string) (time.Time, error) {
	if err := checkWrite(ctx, name, nil); err != nil {
		return time.Time{}, err
	}
	var until time.Time
	err := guarded(func() (err error) {
		until, err = s.erase(ctx, s.prefix+name)
		return err
	})
	return until, s.fail(ctx, envelope.OpErase, err)
}

// Make is part of envelope.Maker.
func (s *bucketStore) Make(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.fail(ctx, envelope.OpMake, guarded(func() error { return s.create(ctx) }))
}

// Permissions is part of envelope.Permitter.
func (s *bucketStore) Permissions() map[string]string { return s.needs }

func (s *bucketStore) Close() error {
	s.idle()
	return s.bucket.Close()
}

// guarded calls f, which calls a client. Google's own and gocloud.dev's drivers
// take parts of an answer for granted, and panic where a hostile service leaves
// them out.
func guarded(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = errdefs.Errorf(errdefs.ErrState, "the answer lacks what the service always says: is this the right endpoint? (%.200s)", fmt.Sprint(p))
		}
	}()
	return f()
}

// fail gives err its class, and words for people.
func (s *bucketStore) fail(ctx context.Context, op string, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", s.where, ctx.Err())
	}
	v, said := s.faultOf(ctx, err)
	needs := s.needs[op]
	switch {
	case v == conditionFail && op == envelope.OpCreate:
		return errdefs.Errorf(errdefs.ErrExists, "the store has that object already")
	case (v == conditionFail || v == noObject || v == busy) && (op == envelope.OpReplace || op == envelope.OpDelete):
		return errChanged()
	case v == noObject && op == envelope.OpRead:
		return errdefs.Errorf(errdefs.ErrNotFound, "the store has no such object")
	case v == noBucket:
		return errdefs.Errorf(errdefs.ErrState, "there is no %s (%s): make it with: key-service store create", s.where, said)
	case v == taken:
		return errdefs.Errorf(errdefs.ErrExists, "the name of %s is taken by someone else (%s): choose another one", s.where, said)
	case v == denied && op == envelope.OpRead:
		return errdefs.Errorf(errdefs.ErrDenied, "%s: %s is refused; it needs %s%s (%s)", s.where, op, needs, s.deniedRead, said)
	case v == denied:
		return errdefs.Errorf(errdefs.ErrDenied, "%s: %s is refused; it needs %s (%s)", s.where, op, needs, said)
	case v == refused:
		return errdefs.Errorf(errdefs.ErrDenied, "%s: %s", s.where, said)
	case v == impossible:
		return errdefs.Errorf(errdefs.ErrInvalid, "%s: %s cannot work: %s", s.where, op, said)
	case v == odd:
		return errdefs.Errorf(errdefs.ErrState, "%s: %s: %s", s.where, op, said)
	}
	return errdefs.Errorf(errdefs.ErrUnavailable, "%s: %s: %s", s.where, op, said)
}

// faultOf is fault; errors of our own have their class already.
func (s *bucketStore) faultOf(ctx context.Context, err error) (verdict, string) {
	switch class := errdefs.Class(err); {
	case class == nil:
		return s.fault(ctx, err)
	case errors.Is(class, errdefs.ErrConflict):
		return conditionFail, ""
	case errors.Is(class, errdefs.ErrDenied): // credentials too
		return refused, said(err)
	case errors.Is(class, errdefs.ErrInvalid):
		return impossible, said(err)
	case errors.Is(class, errdefs.ErrState):
		return odd, said(err)
	}
	return unanswered, said(err)
}

// said is what an error tells, short, on one line, and without a request's
// URL, which may hold a signature.
func said(err error) string {
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err
	}
	return cut(err.Error())
}

func cut(text string) string {
	text = strings.Join(strings.Fields(text), " ")
	if len(text) > maxSaid {
		text = strings.ToValidUTF8(text[:maxSaid], "") + "…"
	}
	return text
}

// later returns the later of two times.
func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// pause says whether d passed before ctx ended.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// checkPrefix lets a prefix through that keeps stores in one bucket apart: it
// ends with "/", so no store's prefix followed by a name can be within
// another's.
func checkPrefix(prefix string) error {
	if prefix == "" {
		return nil
	}
	if len(prefix) > 200 || !regexp.MustCompile(`^([A-Za-z0-9_-]+/)+$`).MatchString(prefix) {
		return errdefs.Errorf(errdefs.ErrInvalid, `URI parameter "prefix": must be like clusters/prod/: at most 200 letters, digits, '-', '_' and '/', and end with '/'`)
	}
	return nil
}

// paramsOf returns the parameters of u, with a checked "prefix".
func paramsOf(u *url.URL, known []string, more ...string) (map[string]string, error) {
	params, err := kms.Params(u, slices.Concat(known, more)...)
	if err != nil {
		return nil, err
	}
	return params, checkPrefix(params["prefix"])
}

// bucketOf returns the bucket that a URI names.
func bucketOf(u *url.URL, pattern, example string) (string, error) {
	if u.Opaque != "" || u.Path != "" && u.Path != "/" || !regexp.MustCompile(pattern).MatchString(u.Host) {
		return "", errdefs.Errorf(errdefs.ErrInvalid, "it must name a bucket and nothing else: %s (a folder in it is given by the parameter \"prefix\")", example)
	}
	return u.Host, nil
}

var nameForm = regexp.MustCompile(`^[a-z][a-z0-9-]*$`)

// checkName keeps names to what the stores' contract allows.
func checkName(name string) error {
	if len(name) > 100 || !nameForm.MatchString(name) {
		return errdefs.Errorf(errdefs.ErrInvalid, "object name %.110q: must be 1 to 100 lower-case letters, digits and '-', a letter first", name)
	}
	return nil
}

// checkWrite is what every operation on an object asks first.
func checkWrite(ctx context.Context, name string, data []byte) error {
	if len(data) > envelope.MaxObject {
		return errdefs.Errorf(errdefs.ErrInvalid, "object of %d bytes: at most %d", len(data), envelope.MaxObject)
	}
	return errors.Join(checkName(name), ctx.Err())
}

func errChanged() error {
	return errdefs.Errorf(errdefs.ErrConflict, "the object was changed or deleted by someone else")
}
