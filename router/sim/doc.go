// Package sim runs a whole gateway with everything around it from one seed, in one
// goroutine, on a simulated clock: a root, a controller, members, hosts of the VPC,
// the kernel's tables, disks and the wires between them. Faults happen at random, and
// after each step it is checked that what must always hold still does.
//
// What is simulated is what the machine does. The gateway, its plan, its forwarding
// plane and all nodes are the real ones, moved by their Stepped forms. A seed that
// fails does so again, step for step.
//
//	go test ./router/sim                             some seeds
//	go test ./router/sim -run Worlds -seed 17 -v      one seed, with its events
//	make simulate SIM=1h                             as many as there is time for
//	make simulate-faults                             which planted faults are found
package sim
