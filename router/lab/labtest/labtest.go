// Package labtest ends labs with the tests that started them.
package labtest

import (
	"os"
	"testing"

	"ztgate/router/lab"
)

// End removes a lab when the test ends. If the test failed, it shows the last lines of
// every process first.
func End(t testing.TB, top *lab.Topology) {
	t.Cleanup(func() {
		if t.Failed() {
			for _, p := range top.Processes() {
				t.Log("\n" + p.Tail(30))
			}
		}
		if err := top.Close(); err != nil {
			t.Error(err)
		}
		_ = os.RemoveAll(top.LogDir)
	})
}
