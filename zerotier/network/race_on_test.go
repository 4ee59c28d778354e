//go:build race

package network_test

// raceEnabled shrinks the largest tests: the detector makes them ten times slower.
const raceEnabled = true
