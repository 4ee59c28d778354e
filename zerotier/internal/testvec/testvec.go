// Package testvec loads the protocol test vectors in zerotier/testdata/vectors.
package testvec

import (
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"testing"
)

// Load decodes vectors/name (for example "mac.json") into v. Every vector file
// is a JSON object; its "description" field explains the other fields.
func Load(t testing.TB, name string, v any) {
	t.Helper()
	_, self, _, _ := runtime.Caller(0)
	path := filepath.Join(filepath.Dir(self), "..", "..", "testdata", "vectors", name)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("read vectors: %v", err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatalf("decode vectors %s: %v", name, err)
	}
}

// Hex is a byte string written as hexadecimal digits in a vector file.
type Hex []byte

// UnmarshalJSON implements [json.Unmarshaler].
func (h *Hex) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	d, err := hex.DecodeString(s)
	*h = d
	return err
}

// Tally counts the cases of one list of a vector file that a test judges. When the
// test ends, it fails if some were neither judged nor left out with a reason.
type Tally struct {
	t          testing.TB
	name, list string
	total      int
	judged     int
	left       []string
}

// Count begins to count the cases of a list, which is a field of vectors/name. A
// field that is no list is one case.
func Count(t testing.TB, name, list string) *Tally {
	t.Helper()
	var file map[string]json.RawMessage
	Load(t, name, &file)
	field, ok := file[list]
	if !ok {
		t.Fatalf("%s has no %q", name, list)
	}
	n := &Tally{t: t, name: name, list: list, total: 1}
	var items []json.RawMessage
	if json.Unmarshal(field, &items) == nil {
		n.total = len(items)
	}
	t.Cleanup(n.check)
	return n
}

// Judge notes that a case is compared with what the file says of it.
func (n *Tally) Judge() { n.judged++ }

// Leave notes that a case isn't compared, and why.
func (n *Tally) Leave(name, reason string) {
	n.left = append(n.left, name)
	n.t.Logf("%s, %s, %s: %s", n.name, n.list, name, reason)
}

func (n *Tally) check() {
	if !n.t.Failed() && n.judged+len(n.left) != n.total {
		n.t.Errorf("%s, %s: %d cases judged and %d left out, of %d", n.name, n.list, n.judged, len(n.left), n.total)
	}
}
