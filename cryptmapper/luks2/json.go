package luks2

import (
	"fmt"
	"strings"
)

// What libcryptsetup writes is JSON in its plainest form: no space between
// tokens, printable ASCII, two escapes, integers. This reader takes that form
// and nothing else, so that there is one reading of what it took: every parser,
// libcryptsetup's json-c among them, sees the same. Go's encoding/json is no
// use here: it folds the case of keys, keeps the last of two equal keys and
// replaces what is not UTF-8.

// The bounds of a header's JSON; the headers that exist stay far below.
const (
	maxDepth   = 8
	maxMembers = 32
)

// A kind of JSON value.
type kind string

const (
	isObject kind = "an object"
	isArray  kind = "a list"
	isString kind = "a string"
	isNumber kind = "a number"
	isBool   kind = "a truth value"
)

// value is a JSON value.
type value struct {
	kind    kind
	text    string   // a string's characters; a number or truth value as it is written
	members []member // an object's, in their order
	items   []value  // an array's
	from    int      // the first byte of the value in the text
	to      int      // the byte after its last
}

type member struct {
	key   string
	value value
}

// member returns that with the key, exactly as written, or nil.
func (v *value) member(key string) *value {
	for i := range v.members {
		if v.members[i].key == key {
			return &v.members[i].value
		}
	}
	return nil
}

// String is how a value stands in a message: never longer than a line.
func (v *value) String() string {
	switch v.kind {
	case isString:
		return fmt.Sprintf("%.80q", v.text)
	case isNumber:
		return "the number " + v.text[:min(len(v.text), 40)]
	case isBool:
		return v.text
	default:
		return string(v.kind)
	}
}

// reader is at one place in a text.
type reader struct {
	text string
	at   int
}

// readJSON reads text, which must be one object and nothing else.
func readJSON(text string) (value, error) {
	r := &reader{text: text}
	v, err := r.value(0)
	switch {
	case err != nil:
		return value{}, fmt.Errorf("JSON, byte %d: %w", r.at, err)
	case v.kind != isObject:
		return value{}, fmt.Errorf("JSON is %s and must be an object", v.kind)
	case r.at != len(text):
		return value{}, fmt.Errorf("JSON, byte %d: there is something behind the end", r.at)
	}
	return v, nil
}

func (r *reader) value(depth int) (v value, err error) {
	if depth == maxDepth {
		return value{}, fmt.Errorf("nested deeper than %d", maxDepth)
	}
	from := r.at
	switch c := r.peek(); {
	case c == '{':
		v, err = r.object(depth)
	case c == '[':
		v, err = r.array(depth)
	case c == '"':
		v.kind = isString
		v.text, err = r.string()
	case c >= '0' && c <= '9':
		v.kind = isNumber
		v.text, err = r.number()
	case r.skip("true"):
		v = value{kind: isBool, text: "true"}
	case r.skip("false"):
		v = value{kind: isBool, text: "false"}
	default:
		err = r.unexpected("a value")
	}
	v.from, v.to = from, r.at
	return v, err
}

func (r *reader) object(depth int) (value, error) {
	v := value{kind: isObject}
	for r.at++; ; r.at++ {
		if len(v.members) == 0 && r.skip("}") {
			return v, nil
		}
		if r.peek() != '"' {
			return value{}, r.unexpected("a key")
		}
		key, err := r.string()
		switch {
		case err != nil:
			return value{}, err
		case v.member(key) != nil:
			return value{}, fmt.Errorf("key %.80q stands twice in one object", key)
		case len(v.members) == maxMembers:
			return value{}, fmt.Errorf("an object has more than %d members", maxMembers)
		case !r.skip(":"):
			return value{}, r.unexpected("a colon")
		}
		m, err := r.value(depth + 1)
		if err != nil {
			return value{}, err
		}
		v.members = append(v.members, member{key, m})
		if r.skip("}") {
			return v, nil
		}
		if r.peek() != ',' {
			return value{}, r.unexpected("a comma")
		}
	}
}

func (r *reader) array(depth int) (value, error) {
	v := value{kind: isArray}
	for r.at++; ; r.at++ {
		if len(v.items) == 0 && r.skip("]") {
			return v, nil
		}
		if len(v.items) == maxMembers {
			return value{}, fmt.Errorf("a list has more than %d items", maxMembers)
		}
		item, err := r.value(depth + 1)
		if err != nil {
			return value{}, err
		}
		v.items = append(v.items, item)
		if r.skip("]") {
			return v, nil
		}
		if r.peek() != ',' {
			return value{}, r.unexpected("a comma")
		}
	}
}

// string reads a string of printable ASCII. Of the escapes only those of quote
// and backslash are known: libcryptsetup writes no other for such characters.
func (r *reader) string() (string, error) {
	var b strings.Builder
	for r.at++; ; r.at++ {
		c := r.peek()
		switch {
		case c == '"':
			r.at++
			return b.String(), nil
		case c == '\\':
			r.at++
			if c = r.peek(); c != '"' && c != '\\' {
				return "", r.unexpected(`a quote or backslash after a backslash`)
			}
		case c < ' ' || c > '~':
			return "", r.unexpected("a printable ASCII character")
		}
		b.WriteByte(c)
	}
}

// number reads an integer without sign, fraction, exponent or leading zeros.
func (r *reader) number() (string, error) {
	from := r.at
	for c := r.peek(); c >= '0' && c <= '9'; c = r.peek() {
		r.at++
	}
	text := r.text[from:r.at]
	if c := r.peek(); c == '.' || c == 'e' || c == 'E' || text[0] == '0' && len(text) > 1 {
		return "", fmt.Errorf("a number that is not a plain integer")
	}
	return text, nil
}

// peek returns the next byte, 0 at the end of the text: no text has one inside.
func (r *reader) peek() byte {
	if r.at == len(r.text) {
		return 0
	}
	return r.text[r.at]
}

func (r *reader) skip(token string) bool {
	if !strings.HasPrefix(r.text[r.at:], token) {
		return false
	}
	r.at += len(token)
	return true
}

func (r *reader) unexpected(want string) error {
	if r.at == len(r.text) {
		return fmt.Errorf("the text ends where %s must be", want)
	}
	return fmt.Errorf("%q stands where %s must be", r.text[r.at:r.at+1], want)
}
