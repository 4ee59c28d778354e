package packet

import (
	"errors"
	"os"
	"testing"
)

// A host inside that sends without end is told so.
func TestInjectedAreBounded(t *testing.T) {
	r, w, err := os.Pipe() // stands for the socket
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	defer r.Close()
	d := &Device{file: r}
	for range maxInjected {
		if err := d.Inject([]byte("packet")); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Inject([]byte("packet")); !errors.Is(err, errFull) {
		t.Errorf("one more: %v", err)
	}
	rd := &reader{d: d, bufs: [][]byte{make([]byte, 16), make([]byte, 16)}, sizes: make([]int, 2), at: 4}
	rd.injected()
	if rd.n != 2 || rd.sizes[1] != 6 || string(rd.bufs[1][4:10]) != "packet" {
		t.Errorf("%d packets were read, the last of %d bytes", rd.n, rd.sizes[1])
	}
	if err := d.Inject([]byte("packet")); err != nil {
		t.Errorf("after some were read: %v", err)
	}
}
