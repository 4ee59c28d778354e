package control

import (
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestErrorLog: complaints of HTTP servers are logged once a minute.
func TestErrorLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		l := &ErrorLog{Log: slog.New(slog.NewTextHandler(&out, nil))}
		for range 120 {
			if _, err := l.Write([]byte("http: Accept error: too many open files\n")); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		if n := strings.Count(out.String(), "too many open files"); n != 2 || !strings.Contains(out.String(), "left_out=59") {
			t.Errorf("two minutes of complaints: %s", out.String())
		}
	})
}
