/* Set-user-ID root in its image: says whether that counts. */
#include <stdio.h>
#include <unistd.h>

int main(void) {
    printf("Effective uid: %u\n", geteuid());
    return 0;
}
