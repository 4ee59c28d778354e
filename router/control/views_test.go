package control

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"testing"
)

// What operators and their programs read keeps its shape. A file holds objects with all
// fields set and empty ones; none may gain, lose or rename a key.
func TestViewsJSON(t *testing.T) {
	for name, v := range map[string]any{
		"info": &[]Info{}, "networks": &[]Networks{}, "peers": &[]Peers{}, "moons": &[]Moons{}, "status": &[]Status{},
	} {
		t.Run(name, func(t *testing.T) {
			want, err := os.ReadFile(filepath.Join("testdata", name+".json"))
			if err != nil {
				t.Fatal(err)
			}
			d := json.NewDecoder(bytes.NewReader(want))
			d.DisallowUnknownFields()
			if err := d.Decode(v); err != nil {
				t.Fatal(err)
			}
			got, err := json.MarshalIndent(v, "", "\t")
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(generic(t, got), generic(t, want)) {
				t.Errorf("got %s\nwant %s", got, want)
			}
			empty := reflect.New(reflect.TypeOf(v).Elem().Elem()).Interface()
			list := generic(t, want).([]any)
			if got, err = json.Marshal(empty); err != nil || !reflect.DeepEqual(generic(t, got), list[len(list)-1]) {
				t.Errorf("empty: %s, %v", got, err)
			}
		})
	}
}

func generic(t *testing.T, b []byte) (v any) {
	t.Helper()
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	return v
}
