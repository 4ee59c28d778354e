package wire

import "testing"

func TestReader(t *testing.T) {
	r := Reader{Buf: []byte{1, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 5, 9}}
	if a, b, c, d, e := r.U8(), r.U16(), r.U32(), r.U64(), r.Address(); a != 1 || b != 2 || c != 3 || d != 4 || e != 5 {
		t.Errorf("got %d %d %d %d %d", a, b, c, d, e)
	}
	if r.Left() != 1 || len(r.Rest()) != 1 || r.Failed {
		t.Errorf("left %d, failed %v", r.Left(), r.Failed)
	}
	if r.Bytes(2) != nil || !r.Failed {
		t.Error("read past the end")
	}
	if r.U8() != 0 {
		t.Error("a field after a failure")
	}
	neg := Reader{Buf: []byte{1}}
	if neg.Bytes(-1) != nil || !neg.Failed {
		t.Error("read backwards")
	}
}
